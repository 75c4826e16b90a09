# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "transformer-lens==4.3.0"]
# ///
"""What TransformerLens says about two tiny random models: patterns, head outputs, logits with a head removed.

And about a random GPT-2 of four layers, its weights as they are: what every head writes at the last token, activation
patching of every head there, and path patching to the logits and to the queries of two heads.

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
PATCHED = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=32, initializer_range=0.3, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
RECEIVERS = [(3, 1), (2, 0)]

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


def boot(model: GPT2LMHeadModel | LlamaForCausalLM, folder: str) -> TransformerBridge:
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")


def patching() -> dict[str, torch.Tensor]:
    """Metric: logit of `right` minus logit of `wrong` at the last token."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(PATCHED).eval()
    heads, layers, width = PATCHED.n_head, PATCHED.n_layer, PATCHED.n_embd // PATCHED.n_head
    ids = torch.randint(3, VOCABULARY, (3, LENGTH))
    twin = ids.clone()
    twin[:, 3] = 3 + (ids[:, 3] + 2) % (VOCABULARY - 3)
    right, wrong = torch.tensor([4, 9, 11]), torch.tensor([5, 30, 21])
    weights = {f"patching.weights.{key}": value.clone() for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bridge = boot(model, folder)

        def metric(logits: torch.Tensor) -> torch.Tensor:
            row = torch.arange(len(ids))
            return logits[row, -1, right] - logits[row, -1, wrong]

        logits, clean = bridge.run_with_cache(ids)
        _, corrupt = bridge.run_with_cache(twin)
        clean = {name: clean[name].clone() for name in clean}
        corrupt = {name: corrupt[name].clone() for name in corrupt}

        def z_of(cache: dict, layer: int) -> torch.Tensor:
            return cache[f"blocks.{layer}.attn.hook_z"].reshape(*ids.shape, heads, width)

        def put(layer: int, sender: tuple[int, int], freeze: bool):
            def hook(z, hook):
                new = z.reshape(*ids.shape, heads, width).clone()
                if freeze:
                    new[:, -1] = z_of(clean, layer)[:, -1]
                if layer == sender[0]:
                    new[:, -1, sender[1]] = z_of(corrupt, layer)[:, -1, sender[1]]
                return new.reshape(z.shape)

            return f"blocks.{layer}.attn.hook_z", hook

        names = ("total", "logits", "queries")
        found = {name: torch.full((len(ids), layers, heads), torch.nan) for name in names}
        written = torch.zeros(len(ids), layers, heads, PATCHED.n_embd)
        before = metric(logits)
        for layer in range(layers):
            matrix = model.transformer.h[layer].attn.c_proj.weight.reshape(heads, width, -1)
            written[:, layer] = torch.einsum("bhe,hec->bhc", z_of(clean, layer)[:, -1], matrix)
            for head in range(heads):
                sender = (layer, head)
                patched = bridge.run_with_hooks(ids, fwd_hooks=[put(layer, sender, False)])
                found["total"][:, layer, head] = metric(patched) - before
                frozen = [put(other, sender, True) for other in range(layers)]
                seen = {}

                def keep(at: int, seen: dict = seen):
                    def hook(q, hook):
                        seen[at] = q.clone()
                        return q

                    return f"blocks.{at}.attn.hook_q", hook

                queries = [keep(at) for at, _ in RECEIVERS]
                patched = bridge.run_with_hooks(ids, fwd_hooks=[*frozen, *queries])
                found["logits"][:, layer, head] = metric(patched) - before
                if layer >= max(at for at, _ in RECEIVERS):
                    continue

                def give(at: int, number: int, seen: dict = seen):
                    def hook(q, hook):
                        new = q.reshape(*ids.shape, heads, width).clone()
                        new[:, :, number] = seen[at].reshape(new.shape)[:, :, number]
                        return new.reshape(q.shape)

                    return f"blocks.{at}.attn.hook_q", hook

                received = [give(at, number) for at, number in RECEIVERS]
                found["queries"][:, layer, head] = metric(bridge.run_with_hooks(ids, fwd_hooks=received)) - before
    given = {"ids": ids, "twin": twin, "right": right, "wrong": wrong, "clean": before, "written": written}
    return weights | {f"patching.{name}": value for name, value in (given | found).items()}


def main(out: str) -> None:
    tensors, configs = {}, {}
    for name, (make, config) in CONFIGS.items():
        torch.manual_seed(SEED)
        model = make(config).eval()
        ids = torch.randint(3, VOCABULARY, (2, LENGTH))
        tensors |= {f"{name}.weights.{key}": value.clone() for key, value in model.state_dict().items()}
        configs[name] = config.to_dict()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            bridge = boot(model, folder)
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
    tensors |= patching()
    configs["patching"] = PATCHED.to_dict()
    versions = {name: version(name) for name in ("torch", "transformers", "transformer-lens")}
    metadata = {"versions": json.dumps(versions), "configs": json.dumps(configs, default=str), "seed": str(SEED)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
