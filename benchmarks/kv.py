"""Decoding on a filled cache: budgets for heads beside transformers' own caches, 1k to 32k tokens.

All do the same work: eight tokens, one by one, after a prompt of so many tokens. The prompt is not read: its keys and
values are random numbers put into each cache, as reading 32k tokens would take longer than all the rest. Ratios are to
DynamicCache; memory is the peak of a process that fills one cache and decodes, the model (28 MiB) included.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import Benchmark, Variant, setting
from benchmarks._kv_work import LAYERS, LENGTHS, NEW, ROOM, SIZE, contents, model
from headwise.memory.budget_policies import SnapKVPolicy, StreamingPolicy, TaskKVPolicy
from headwise.memory.task_kv import HeadBudgetCache


def stock(name: str, length: int) -> Any:
    import transformers

    options = {"max_cache_len": length + ROOM} if name == "StaticCache" else {}
    made = getattr(transformers, name)(config=model().config, **options)
    for layer in range(LAYERS):
        _, key, value = contents(layer, length)
        made.update(key, value, layer)
    return made


def ours(policy: Any, length: int) -> Any:
    made: Any = HeadBudgetCache(model(), policy)
    for number, layer in enumerate(model().model.layers):
        query, key, value = contents(number, length)
        made.update(key, value, number)
        made.layers[number].settle(layer.self_attn, query, None, scaling=SIZE**-0.5)
    return made


def decoding(make: Callable[[int], Any], length: int) -> Callable[[], torch.Tensor]:
    filled = make(length)
    token = torch.ones(1, 1, dtype=torch.long, device=setting.device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return torch.stack([model()(input_ids=token, cache=filled).logits for _ in range(NEW)])

    return run


def variants(length: int) -> list[Variant]:
    made: dict[str, Callable[[int], Any]] = {
        "DynamicCache": partial(stock, "DynamicCache"),
        "StaticCache": partial(stock, "StaticCache"),
        "Task-KV, the whole prompt": partial(ours, TaskKVPolicy(1.0)),
        "Task-KV, 40 % of the bytes": partial(ours, TaskKVPolicy(0.4)),
        "Task-KV, 20 % of the bytes": partial(ours, TaskKVPolicy(0.2, recent=64)),
        "SnapKV, 40 % of the bytes": partial(ours, SnapKVPolicy(0.4)),
        "StreamingLLM, 40 % of the bytes": partial(ours, StreamingPolicy(0.4)),
    }
    found = [Variant(name, partial(decoding, make, length)) for name, make in made.items()]
    skip = "kvpress 0.5.4 needs transformers below 5.3; benchmarks/_kvpress.py runs it in an environment of its own"
    return [*found, Variant("kvpress SnapKV", lambda: lambda: None, skip)]


def check() -> None:
    """With a full budget the tokens that follow get the bits of DynamicCache; with less, other ones."""
    runs: dict[str, Any] = {variant.name: variant.make()() for variant in variants(LENGTHS[0]) if variant.skip is None}
    whole = runs.pop("Task-KV, the whole prompt")
    if not torch.equal(whole, runs["DynamicCache"]) and setting.device == "cpu":
        raise AssertionError("kv: a cache of the whole prompt differs from DynamicCache")
    torch.testing.assert_close(whole, runs["StaticCache"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole, runs["DynamicCache"], rtol=1e-3, atol=1e-3)
    if any(torch.equal(whole, run) for name, run in runs.items() if "%" in name):
        raise AssertionError("kv: a cache that drops tokens gives what the whole gives")


def benchmark() -> Benchmark:
    return Benchmark("kv", {f"{length:,} tokens": partial(variants, length) for length in LENGTHS}, check, rounds=7)
