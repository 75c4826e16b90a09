"""Neighbourhood attention through FlexAttention, for GPUs, and through NATTEN where its CUDA library is installed.

Flex skips blocks of the score matrix that no query sees. On grids of two or three axes the tokens are put in the order
of small tiles first, so that few blocks are partly filled; in row-major order most would be.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from headwise.attention._neighborhood_axes import Axis

TILES = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}  # 128 tokens, the block of a block mask


@lru_cache(maxsize=64)
def _order(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tokens in the order of tiles, and the place of every token in it; tiles at the edge are cut, not padded."""
    with torch.inference_mode(False):
        tiles = TILES[len(lengths)]
        place = torch.zeros((), dtype=torch.long)
        inside = torch.zeros((), dtype=torch.long)
        for axis, (length, tile) in enumerate(zip(lengths, tiles, strict=True)):
            shape = [1] * len(lengths)
            shape[axis] = length
            at = torch.arange(length).view(shape)
            place = place * (-(-length // tile)) + at // tile
            inside = inside * tile + at % tile
        weight = 1
        for tile in tiles:
            weight *= tile
        order = (place * weight + inside).flatten().argsort()
        return order, order.argsort()


def _sees(axes: Sequence[Axis], i: Sequence[Tensor], j: Sequence[Tensor]) -> Tensor:
    """Whether queries at coordinates i see keys at coordinates j."""
    seen = axes[0].sees(i[0], j[0])
    for axis, a, b in zip(axes[1:], i[1:], j[1:], strict=True):
        seen = seen & axis.sees(a, b)
    return seen


@lru_cache(maxsize=32)
def _block_mask(axes: tuple[Axis, ...], device: torch.device, compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = tuple(axis.length for axis in axes)
    with torch.inference_mode(False):
        coordinates = torch.unravel_index(_order(lengths)[0], lengths)
        places = [one.to(device) for one in coordinates]

        tokens = len(places[0])
        mask_mod = lambda b, h, i, j: _sees(axes, [at[i] for at in places], [at[j] for at in places])  # noqa: E731
        return create_block_mask(mask_mod, None, None, tokens, tokens, device=device, _compile=compiled)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[Axis], scale: float) -> tuple[Tensor, Tensor]:
    """Outputs `[b h *S e]` and log-sum-exp of heads-first tensors; compiled on CUDA, eager elsewhere (for tests: it
    makes all scores there)."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    grid, rank = q.shape[2:-1], len(axes)
    order, back = (x.to(q.device) for x in _order(tuple(grid)))
    q, k, v = (x.flatten(2, 1 + rank)[:, :, order] for x in (q, k, v))
    on_gpu = q.device.type == "cuda"
    mask = _block_mask(tuple(axes), q.device, on_gpu)
    attend: Any = _compiled() if on_gpu else flex_attention
    out, aux = attend(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out[:, :, back].unflatten(2, grid), aux.lse[:, :, back].unflatten(2, grid)


def natten_unavailable() -> str | None:
    """Why NATTEN's fused kernels cannot be used; None where they can."""
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    import natten

    return None if getattr(natten, "HAS_LIBNATTEN", False) else "natten is installed without its CUDA library"


def natten(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[Axis], scale: float) -> tuple[Tensor, Tensor]:
    """The same through NATTEN's operators."""
    import natten as library

    function = getattr(library, f"na{len(axes)}d")
    last = [x.movedim(1, -2) for x in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        last[1:] = [x.repeat_interleave(repeats, -2) for x in last[1:]]
    out, lse = function(
        *last,
        kernel_size=tuple(axis.kernel for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        dilation=tuple(axis.dilation for axis in axes),
        is_causal=tuple(axis.causal for axis in axes),
        scale=scale,
        return_lse=True,
    )
    return out.movedim(-2, 1), lse.movedim(-1, 1)
