"""kvpress beside the DynamicCache of its own transformers: the row that `headwise bench kv` cannot run.

kvpress 0.5.4 needs transformers below 5.3. `python tests/oracles/make.py kvpress` makes an environment for it; there

    PYTHONPATH=. OMP_NUM_THREADS=1 .venv-oracles/kvpress/bin/python -m benchmarks._kvpress > results/bench-kvpress.json

The same model, contents and work as in `benchmarks/kv.py`, ratios to that DynamicCache.
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from benchmarks import Benchmark, Variant, _measure, machine

LAYERS, HEADS, KEY_HEADS, SIZE, WIDTH, VOCABULARY = 4, 8, 4, 64, 512, 1024
LENGTHS = (1024, 4096, 16384, 32768)
NEW, DROPPED, ROUNDS = 8, 0.6, 7


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=SIZE,
        max_position_embeddings=LENGTHS[-1] + 512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def filled(made: Any, length: int, press: Any) -> Any:
    """A cache of random keys and values; with a press of those that it keeps, judged by random hidden states."""
    from transformers import DynamicCache

    found = DynamicCache(config=made.config)
    for number, layer in enumerate(made.model.layers):
        generator = torch.Generator().manual_seed(number)
        hidden = torch.randn(1, length, WIDTH, generator=generator)
        keys, values = (torch.randn(1, KEY_HEADS, length, SIZE, generator=generator) for _ in range(2))
        if press is not None:
            places = made.model.rotary_emb(hidden, torch.arange(length)[None])
            keys, values = press.compress(layer.self_attn, hidden, keys, values, None, {"position_embeddings": places})
        found.update(keys, values, number)
    return found


def decoding(made: Any, length: int, dropped: float) -> Any:
    from kvpress import SnapKVPress

    kept = filled(made, length, SnapKVPress(compression_ratio=dropped) if dropped else None)
    if kept.get_seq_length() != int(length * (1 - dropped)):
        raise RuntimeError(f"kvpress: {kept.get_seq_length()} of {length} tokens are kept")
    token, place = torch.ones(1, 1, dtype=torch.long), length

    @torch.no_grad()
    def run() -> torch.Tensor:
        nonlocal place
        said = []
        for _ in range(NEW):
            said.append(made(input_ids=token, past_key_values=kept, position_ids=torch.tensor([[place]])).logits)
            place += 1
        return torch.stack(said)

    return run


def main() -> None:
    rows, made = [], model()
    for length in LENGTHS:
        variants = [
            Variant("DynamicCache", partial(decoding, made, length, 0.0)),
            Variant("kvpress SnapKV, 40 % of the bytes", partial(decoding, made, length, DROPPED)),
        ]
        kv = Benchmark("kvpress", {})
        log = partial(print, file=sys.stderr, flush=True)
        rows += [asdict(row) for row in _measure(kv, f"{length:,} tokens", variants, ROUNDS, False, log)]
    versions = {package: version(package) for package in ("torch", "transformers", "kvpress")}
    print(json.dumps({"machine": machine(), "versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
