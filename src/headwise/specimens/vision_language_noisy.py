"""The `vision-language-noisy` specimen: `vision-language` in stronger noise, where the prior has more to say."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headwise.specimens import vision_language

NAME = "vision-language-noisy"
SUMMARY = "the vision-language specimen in noise of 2 instead of 1.2: what is typical is named far more often"
SIGMA = 2.0


def train(
    out: str | Path,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    steps: int | None = None,
    others: Sequence[int] = (),
) -> Path:
    """Train from nothing and write the model, its processor and card to `out`. steps: another number of steps."""
    return vision_language.train(
        out, seed=seed, log=log, steps=steps, others=others, sigma=SIGMA, name=NAME, summary=SUMMARY
    )
