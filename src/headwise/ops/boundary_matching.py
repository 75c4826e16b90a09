"""Samples of every segment of a sequence: the sampling weights of BMN's boundary-matching layer.

A pair (i, j) with i <= j is the segment from i to j + 1. It is widened by `ratio` times (its length + 1) on both sides
and read at `bins * points` places evenly spaced with both ends included, interpolated linearly, averaged in each bin.

Kept as in the official code, because trained weights depend on it: the + 1, and truncation towards zero, by which a
place between -1 and 0 reads step 0 in full, while one between t - 1 and t reads step t - 1 in part. Others outside
read 0.
"""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["boundary_pairs", "boundary_samples", "sample_pairs"]


def boundary_pairs(steps: int) -> tuple[Tensor, Tensor]:
    """Starts and ends of all pairs `i <= j`, `[p]` each, in rows of the start."""
    index = torch.triu_indices(steps, steps)
    return index[0], index[1]


@lru_cache(maxsize=4)
def boundary_samples(steps: int, bins: int = 32, points: int = 3, ratio: float = 0.5) -> Tensor:
    """The weights as a sparse CSR matrix `[p, bins * steps]` in float32: row = pair, column = bin * steps + step.

    About 3 numbers a bin: 480,000 of 16 million for 100 steps and 32 bins. Raises ValueError for fewer than 2 steps.
    """
    if steps < 2 or bins < 1 or points < 1 or bins * points < 2 or ratio < 0:
        raise ValueError(
            f"boundary_samples: steps {steps}, bins {bins}, points {points}, ratio {ratio}; expected at least 2 steps, "
            "1 bin and 1 point of which there are 2 together, and a ratio of 0 or more"
        )
    starts, ends = boundary_pairs(steps)
    low, high = starts.double(), ends.double() + 1
    margin = (high - low + 1) * ratio
    first, last = low - margin, high + margin
    count = bins * points
    places = first[:, None] + ((last - first) / (count - 1))[:, None] * torch.arange(count, dtype=torch.float64)
    down, up = places.trunc(), places.ceil()
    share = places - down
    rows = torch.arange(len(starts))[:, None].expand_as(places)
    offset = (torch.arange(count) // points * steps)[None].expand_as(places)
    index, values = [], []
    for step, weight in ((down, 1 - share), (up, share)):
        inside = (step >= 0) & (step <= steps - 1)
        index.append(torch.stack([rows[inside], offset[inside] + step[inside].long()]))
        values.append(weight[inside] / points)
    size = (len(starts), bins * steps)
    whole = torch.sparse_coo_tensor(torch.cat(index, 1), torch.cat(values), size, check_invariants=False).coalesce()
    kept = whole.values() != 0
    found = torch.sparse_coo_tensor(whole.indices()[:, kept], whole.values()[kept], size, check_invariants=False)
    return found.coalesce().float()


def sample_pairs(x: Tensor, weights: Tensor) -> Tensor:
    """Sum over bins and steps: `x` `[b c bins steps]` and `boundary_samples` give `[b c p]`. Differentiable in x."""
    b, c = x.shape[:2]
    flat = x.flatten(2).permute(2, 0, 1).reshape(-1, b * c)
    return torch.sparse.mm(weights.to(flat.dtype), flat).view(-1, b, c).permute(1, 2, 0)
