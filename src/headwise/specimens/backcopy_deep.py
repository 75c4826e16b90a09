"""The `backcopy-deep` specimen: `backcopy` with three layers, of which one takes the copying (here the first)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwise.specimens import backcopy

NAME = "backcopy-deep"
SUMMARY = "three layers of one head on Bigram-Backcopy text: head 0.0 is active-dormant, the others near idle"
LAYERS, STEPS = 3, 1200
CHECKPOINTS = (0, 200, 400, 800)


def train(
    out: str | Path,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    steps: int | None = None,
) -> Path:
    """Train from nothing and write model, checkpoints, tokenizer and card to `out`. steps: another number of steps."""
    return backcopy.train(
        out,
        seed=seed,
        log=log,
        steps=STEPS if steps is None else steps,
        layers=LAYERS,
        name=NAME,
        checkpoints=CHECKPOINTS,
    )
