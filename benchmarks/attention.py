"""All attention mechanisms at growing sizes, forward and as a training step: `headwise bench attention`.

Each is timed beside a matrix product of as many operations, softmax attention (SDPA) at equal shape, and the same work
as the official code or the paper writes it, or an installed package does it. What is timed is said in the mechanism's
own module of this folder, under `PARTS`; nothing lists them here.
"""

import importlib
from functools import cache, partial

from benchmarks import Benchmark, names
from benchmarks._parts import Part, digest, inputs_of


@cache
def parts() -> list[tuple[str, list[Part]]]:
    """(module, its parts), in the order of the modules' names."""
    found = []
    for name in names():
        if name != "attention":
            module = importlib.import_module(f"benchmarks.{name}")
            if hasattr(module, "PARTS"):
                found.append((name, list(module.PARTS)))
    return found


def check() -> None:
    """Every mechanism's own check."""
    for name, _ in parts():
        importlib.import_module(f"benchmarks.{name}").check()


def benchmark() -> Benchmark:
    every = [part for _, own in parts() for part in own]
    return Benchmark("attention", inputs_of(every), check, rounds=5, digest=partial(digest, every), call=True)
