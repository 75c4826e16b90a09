# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "transformer-lens==4.3.0"]
# ///
"""What TransformerLens says about two tiny random models: patterns, head outputs, logits with a head removed.

usage: transformer_lens.py OUT.safetensors
"""

import json
import sys
import tempfile
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, VOCABULARY, LENGTH = 0, 40, 9
ABLATED = [(0, 1), (1, 2)]  # layer, head

CONFIGS = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2,
        ),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
        ),
    ),
}  # fmt: skip


def words() -> PreTrainedTokenizerFast:
    """The bridge loads a tokenizer, although ids are given."""
    table = {f"w{i}": i for i in range(VOCABULARY)}
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="w0")), **special)


def main(out: str) -> None:
    tensors, configs = {}, {}
    for name, (make, config) in CONFIGS.items():
        torch.manual_seed(SEED)
        model = make(config).eval()
        ids = torch.randint(3, VOCABULARY, (2, LENGTH))
        tensors |= {f"{name}.weights.{key}": value.clone() for key, value in model.state_dict().items()}
        configs[name] = config.to_dict()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            words().save_pretrained(folder)
            bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")
            logits, cache = bridge.run_with_cache(ids)
            tensors |= {f"{name}.ids": ids, f"{name}.logits": logits.clone()}
            for layer in range(2):
                tensors[f"{name}.pattern.{layer}"] = cache[f"blocks.{layer}.attn.hook_pattern"].clone()
                tensors[f"{name}.z.{layer}"] = cache[f"blocks.{layer}.attn.hook_z"].reshape(2, LENGTH, 4, 8).clone()
            for layer, head in ABLATED:

                def remove(z, hook, head=head):
                    z = z.clone()
                    z.view(2, LENGTH, 4, 8)[:, :, head] = 0
                    return z

                hooks = [(f"blocks.{layer}.attn.hook_z", remove)]
                tensors[f"{name}.without.{layer}.{head}"] = bridge.run_with_hooks(ids, fwd_hooks=hooks).clone()
    versions = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
    metadata = {"versions": json.dumps(versions), "configs": json.dumps(configs, default=str), "seed": str(SEED)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
