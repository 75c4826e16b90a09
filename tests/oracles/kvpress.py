# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "kvpress==0.5.4", "transformers==5.2.0", "safetensors>=0.5"]
# ///
"""What kvpress keeps of a prompt under SnapKV and StreamingLLM, how SnapKV scores it, and what the model says then.

A small Llama with random weights and grouped keys; its weights, and queries, keys and values of each layer, are in the
fixture. kvpress compresses while the prompt is read; the tokens that follow get their true positions.

usage: kvpress.py OUT.safetensors
"""

import json
import sys
from importlib.metadata import version

import torch
from kvpress import SnapKVPress, StreamingLLMPress
from safetensors.torch import save_file
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SEED, LENGTH, LATER = 0, 57, 4
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
# name -> class, share dropped, options
CASES = {
    "snap": (SnapKVPress, 0.6, {"window_size": 8, "kernel_size": 5}),
    "snap-wide": (SnapKVPress, 0.35, {"window_size": 16, "kernel_size": 7}),
    "streaming": (StreamingLLMPress, 0.6, {"n_sink": 4}),
    "streaming-many": (StreamingLLMPress, 0.25, {"n_sink": 9}),
}


def main(out: str) -> None:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="sdpa")).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            weight.data = torch.randn(weight.shape) * (gain if "embed" in name else gain / weight.shape[1] ** 0.5)
    ids = torch.randint(0, CONFIG["vocab_size"], (2, LENGTH + LATER))
    tensors = {"ids": ids} | {f"state/{name}": value for name, value in model.state_dict().items()}
    seen = {}

    def spy(module, query, key, value, attention_mask, **options):
        seen.setdefault(module.layer_idx, (query, key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    with torch.no_grad():
        AttentionInterface.register("spy", spy)
        model.set_attn_implementation("spy")
        model(ids[:, :LENGTH])
        model.set_attn_implementation("sdpa")
        for layer, parts in seen.items():
            tensors |= {f"{layer}/{name}": part for name, part in zip("qkv", parts, strict=True)}
        for name, (cls, dropped, options) in CASES.items():
            press, scores = cls(compression_ratio=dropped, **options), {}
            whole = type(press).score

            def score(self, module, *args, whole=whole, scores=scores):
                scores[module.layer_idx] = whole(self, module, *args)
                return scores[module.layer_idx]

            type(press).score = score
            cache = DynamicCache()
            with press(model):
                model(ids[:, :LENGTH], past_key_values=cache)
            type(press).score = whole
            said = []
            for position in range(LENGTH, LENGTH + LATER):
                at = torch.full((2, 1), position)
                given = {"past_key_values": cache, "position_ids": at}
                said.append(model(ids[:, position : position + 1], **given).logits)
            tensors[f"{name}/logits"] = torch.cat(said, 1)
            for layer in range(CONFIG["num_hidden_layers"]):
                tensors[f"{name}/{layer}/scores"] = scores[layer]
                kept = int(LENGTH * (1 - dropped))
                tensors[f"{name}/{layer}/kept"] = scores[layer].topk(kept, dim=-1).indices.sort(-1).values
    versions = {package: version(package) for package in ("torch", "transformers", "kvpress")}
    cases = {name: {"dropped": dropped, **options} for name, (_, dropped, options) in CASES.items()}
    metadata = {
        "versions": json.dumps(versions), "cases": json.dumps(cases), "config": json.dumps(CONFIG), "seed": str(SEED),
    }  # fmt: skip
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
