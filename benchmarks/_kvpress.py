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
from benchmarks._kv_work import LENGTHS, NEW, WIDTH, contents, model

DROPPED, ROUNDS = 0.6, 7


@torch.no_grad()
def filled(length: int, press: Any) -> Any:
    """A cache of random keys and values; with a press of those that it keeps, judged by random hidden states."""
    from transformers import DynamicCache

    found = DynamicCache(config=model().config)
    for number, layer in enumerate(model().model.layers):
        _, keys, values = contents(number, length)
        if press is not None:
            hidden = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(number))
            places = model().model.rotary_emb(hidden, torch.arange(length)[None])
            keys, values = press.compress(layer.self_attn, hidden, keys, values, None, {"position_embeddings": places})
        found.update(keys, values, number)
    return found


def decoding(length: int, dropped: float) -> Any:
    from kvpress import SnapKVPress

    kept = filled(length, SnapKVPress(compression_ratio=dropped) if dropped else None)
    if kept.get_seq_length() != int(length * (1 - dropped)):
        raise RuntimeError(f"kvpress: {kept.get_seq_length()} of {length} tokens are kept")
    token, place = torch.ones(1, 1, dtype=torch.long), length

    @torch.no_grad()
    def run() -> torch.Tensor:
        nonlocal place
        said = []
        for _ in range(NEW):
            said.append(model()(input_ids=token, past_key_values=kept, position_ids=torch.tensor([[place]])).logits)
            place += 1
        return torch.stack(said)

    return run


def main() -> None:
    rows: list[dict] = []
    for length in LENGTHS:
        variants = [
            Variant("DynamicCache", partial(decoding, length, 0.0)),
            Variant("kvpress SnapKV, 40 % of the bytes", partial(decoding, length, DROPPED)),
        ]
        kv = Benchmark("kvpress", {})
        log = partial(print, file=sys.stderr, flush=True)
        rows += [asdict(row) for row in _measure(kv, f"{length:,} tokens", variants, ROUNDS, False, log)]
    versions = {package: version(package) for package in ("torch", "transformers", "kvpress")}
    print(json.dumps({"machine": machine(), "versions": versions, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
