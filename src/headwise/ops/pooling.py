"""Adaptive average pooling of tokens, on a grid or along a sequence, over the real tokens only where there is a mask.

Window i of n over L tokens is floor(i L / n) up to ceil((i + 1) L / n), as in torch's adaptive pooling: where L is less
than n, windows share tokens.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["pool_grid", "pool_sequence"]


def pool_grid(
    x: Float[Tensor, "b t c"], grid: tuple[int, int], windows: tuple[int, int], mask: Bool[Tensor, "b t"] | None = None
) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"] | None]:
    """Means of `windows` (rows, columns) windows of tokens that lie row by row on a grid of `grid` (rows, columns).

    Returns the means, and with a mask which windows hold a real token (the mean of one without is 0).
    Raises ValueError where the grid has not t places.
    """
    if grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"pool_grid: {x.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]}")

    def pool(y: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(y.mT.unflatten(-1, grid), windows).flatten(2).mT

    if mask is None:
        return pool(x), None
    share = pool(mask[..., None].to(x.dtype))
    return pool(x * mask[..., None]) / torch.where(share > 0, share, 1), share[..., 0] > 0


def pool_sequence(
    x: Float[Tensor, "b t c"], windows: int, mask: Bool[Tensor, "b t"] | None = None
) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"] | None]:
    """Means of n = `windows` windows along the tokens.

    With a mask each row is pooled as if its masked tokens were not there, wherever they stand. Returns the means, and
    with a mask which windows hold a real token: all, or none in a row without any (its means are 0).
    """
    if mask is None:
        return nn.functional.adaptive_avg_pool1d(x.mT, windows).mT, None
    rank, length = mask.cumsum(1) - 1, mask.sum(1)[:, None]
    window = torch.arange(windows, device=x.device)
    first, last = window * length // windows, -(-(window + 1) * length // windows)
    rank = rank[:, None]
    inside = mask[:, None] & (rank >= first[..., None]) & (rank < last[..., None])
    count = inside.sum(-1, keepdim=True)
    return inside.to(x.dtype) @ x / count.clamp_min(1), count[..., 0] > 0
