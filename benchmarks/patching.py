"""Path patching of every head to the logits: the short way, one whole forward a head, and TransformerLens.

All do the same work: eight prompts of 16 tokens, every head of every layer as sender, all other heads frozen at the
last token, MLPs recomputed, logit difference read. TransformerLens runs one forward with hooks a sender, as the paper's
official script does (its third run is left out: to the logits it adds nothing).
"""

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch

from benchmarks import Benchmark, Variant, setting
from headwise.heads.effects import logit_difference
from headwise.heads.patching import path_patch

PROMPTS, LENGTH = 8, 16  # about the length of the prompts that path patching is used on; two minutes on an idle core
LAYERS, HEADS, WIDTH, VOCABULARY = 6, 8, 512, 8192


@cache
def model() -> Any:
    """23 million parameters with random weights, a GPT-2: what TransformerLens runs best."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, bos_token_id=0,
        eos_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    made: Any = GPT2LMHeadModel(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


@cache
def prompts() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (PROMPTS, LENGTH), generator=generator)
    twin = ids.clone()
    twin[:, LENGTH // 2] = (ids[:, LENGTH // 2] + 1) % VOCABULARY
    right, wrong = torch.arange(PROMPTS), torch.arange(PROMPTS) + PROMPTS
    return tuple(part.to(setting.device) for part in (ids, twin, right, wrong))


def ours(implementation: str) -> Callable[[], Any]:
    ids, twin, right, wrong = prompts()

    def run() -> torch.Tensor:
        metric = logit_difference(right, wrong)
        return path_patch(model(), ids, twin, metric, implementation=implementation).heads  # pyright: ignore[reportArgumentType]

    return run


def transformer_lens() -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    from headwise.specimens.registry import load_specimen

    # It asks for a tokenizer and never uses it here; it rebuilds the model that it is given, so it gets its own.
    tokenizer = load_specimen("text").tokenizer
    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=deepcopy(model()), tokenizer=tokenizer)
    ids, twin, right, wrong = prompts()
    metric = logit_difference(right, wrong)
    shape, names = (PROMPTS, LENGTH, HEADS, WIDTH // HEADS), [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        keep = {"names_filter": lambda name: name.endswith("hook_z")}
        logits, clean = bridge.run_with_cache(ids, **keep)
        _, corrupt = bridge.run_with_cache(twin, **keep)
        before = metric(logits[:, -1])
        found = torch.zeros(PROMPTS, LAYERS, HEADS)
        for layer in range(LAYERS):
            for head in range(HEADS):

                def freeze(at: int, layer: int = layer, head: int = head):
                    def hook(z, hook):
                        new = z.reshape(shape).clone()
                        new[:, -1] = clean[names[at]].reshape(shape)[:, -1]
                        if at == layer:
                            new[:, -1, head] = corrupt[names[at]].reshape(shape)[:, -1, head]
                        return new.reshape(z.shape)

                    return names[at], hook

                said = bridge.run_with_hooks(ids, fwd_hooks=[freeze(at) for at in range(LAYERS)])
                found[:, layer, head] = (metric(said[:, -1]) - before).cpu()
        return found

    return run


def variants() -> list[Variant]:
    missing = importlib.util.find_spec("transformer_lens") is None
    skip = "transformer_lens is not installed (extra: rivals)" if missing else None
    return [
        Variant("path_patch", partial(ours, "auto")),
        Variant("path_patch, one whole forward a head", partial(ours, "reference")),
        Variant("TransformerLens run_with_hooks", transformer_lens, skip),
    ]


def check() -> None:
    """The ways agree, the rival's among them where it is installed."""
    bound = 1e-4 if setting.dtype == "float32" else 5e-2
    fast = ours("auto")()
    for variant in variants()[1:]:
        if variant.skip is None:
            torch.testing.assert_close(fast, variant.make()(), rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    return Benchmark("patching", {f"{PROMPTS} prompts of {LENGTH}": variants}, check, rounds=3)
