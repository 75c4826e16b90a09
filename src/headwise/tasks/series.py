"""Series of several channels whose class is a level under outliers, or the channel that has rare bursts."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Series", "burst_series", "contaminated_series"]


@dataclass(frozen=True)
class Series:
    """Values `[n t c]`, labels `[n]`, and the cells `[n t c]` that were changed by hand: outliers, or bursts."""

    values: Float[Tensor, "n t c"]
    labels: Int[Tensor, " n"]
    changed: Bool[Tensor, "n t c"]


def contaminated_series(
    count: int,
    *,
    length: int = 64,
    channels: int = 8,
    classes: int = 4,
    share: float = 0.2,
    shift: float = 6.0,
    spread: float = 0.4,
    seed: int = 0,
    template_seed: int = 0,
) -> Series:
    """A class's level in each channel, N(0, spread^2), plus noise N(0, 1), with outliers.

    In each channel of each series every time is shifted with probability `share`, by +shift or -shift, one sign for
    all of them, so that the mean of the channel is off, by an amount that cannot be foreseen, and its typical value is
    not. template_seed: of the classes' levels.
    Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1 or min(count, length, channels, classes) < 1:
        raise ValueError(
            f"contaminated_series: count {count}, length {length}, channels {channels}, classes {classes}, share "
            f"{share}; expected sizes of 1 or more and a share from 0 to 1"
        )
    levels = spread * torch.randn(classes, channels, generator=torch.Generator().manual_seed(10_000 + template_seed))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=rng)
    values = levels[labels][:, None] + torch.randn(count, length, channels, generator=rng)
    changed = torch.rand(count, length, channels, generator=rng) < share
    sign = torch.randint(2, (count, 1, channels), generator=rng) * 2.0 - 1
    return Series(values + shift * sign * changed, labels, changed)


def burst_series(
    count: int, *, length: int = 64, channels: int = 8, bursts: int = 3, height: float = 3.5, seed: int = 0
) -> Series:
    """Noise N(0, 1), with `height` added at `bursts` times of one channel, which is the label.

    Raises ValueError for more bursts than times.
    """
    if not 0 <= bursts <= length or min(count, length, channels) < 1:
        raise ValueError(
            f"burst_series: count {count}, length {length}, channels {channels}, bursts {bursts}; expected sizes of 1 "
            "or more and at most as many bursts as times"
        )
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(channels, (count,), generator=rng)
    values = torch.randn(count, length, channels, generator=rng)
    here = torch.nn.functional.one_hot(labels, channels).bool()[:, None]
    order = torch.rand(count, length, channels, generator=rng).argsort(1).argsort(1)
    changed = (order < bursts) & here
    return Series(values + height * changed, labels, changed)
