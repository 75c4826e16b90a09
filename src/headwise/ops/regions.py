"""Regions that a row prefers: the choice of where to look closer.

    region c is selected where (p_c - min p) / (max p - min p) > threshold, the row's own minimum and maximum

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["select_regions", "spread_to_fine"]

THRESHOLD = 96 / 255  # the paper's


def select_regions(
    preference: Float[Tensor, "... c"],
    threshold: float = THRESHOLD,
    top_k: int | None = None,
    *,
    ties: Literal["none", "all"] = "none",
) -> Bool[Tensor, "... c"]:
    """The dense token selector: regions whose preference, scaled to 0..1 within its row, exceeds the threshold.

    preference: any scale, such as the attention that a row gives to each region. threshold: 0 to below 1; the most
    preferred region is always selected. top_k: at most so many, the most preferred (of equal ones the first); None is
    no limit. ties: what a row selects that prefers all regions equally, one region alone included.
    Raises ValueError for no regions, and for a threshold or a number out of range.

    >>> select_regions(torch.tensor([0.1, 0.5, 0.2, 0.4])).tolist()
    [False, True, False, True]
    """
    if preference.shape[-1] == 0:
        raise ValueError(
            "select_regions: there are no regions (the last axis is empty); give at least one coarse token"
        )
    if not 0 <= threshold < 1:
        raise ValueError(f"select_regions: threshold is {threshold}; expected 0 to below 1, such as 96 / 255")
    if top_k is not None and top_k < 1:
        raise ValueError(f"select_regions: top_k is {top_k}; expected at least 1, or None for no limit")
    if ties not in ("none", "all"):
        raise ValueError(f"select_regions: ties is {ties!r}; choose 'none' or 'all'")
    shown = preference.detach()
    shown = shown if shown.dtype == torch.float64 else shown.float()
    low, high = shown.amin(-1, keepdim=True), shown.amax(-1, keepdim=True)
    even = ~(high > low)
    chosen = (shown - low) / (high - low).masked_fill(even, 1) > threshold
    chosen = (chosen & ~even) if ties == "none" else (chosen | even)
    if top_k is not None and top_k < shown.shape[-1]:
        best = shown.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        chosen = chosen & torch.zeros_like(chosen).scatter(-1, best, True)
    return chosen


def spread_to_fine(select: Bool[Tensor, "b t c"], parent: Int[Tensor, "b n"]) -> Bool[Tensor, "b t n"]:
    """Each region's choice for each of its fine tokens. parent: the region of every fine token."""
    return select.gather(2, parent[:, None].expand(-1, select.shape[1], -1))
