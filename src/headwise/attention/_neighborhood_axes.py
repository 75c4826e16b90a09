"""Where neighbourhoods lie: per-axis rules, and the tiles into which a grid is cut. Integers only, nothing is attended.

One axis of length L with kernel k, stride s, dilation d. Positions i and j see each other only in the same dilation
group (i mod d == j mod d); inside it let x = i // d, y = j // d, Lg the length of the group:
    l = min((x // s) s + s // 2, Lg - 1),      a = clamp(l - k // 2, 0, Lg - k),   a <= y < a + k
    l = min((x // s) s + s - 1, Lg - 1),       max(l - k + 1, 0) <= y <= x         where the axis is causal
A window that would leave the grid is moved, not cut, except on causal axes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 32 * 2**20  # of masks for each geometry, device and dtype; beyond it they are made tile by tile


@dataclass(frozen=True)
class Axis:
    """One axis of a grid and the rule of its windows."""

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def group(self, number: int) -> "Axis":
        """Dilation group `number` as an axis of its own, without dilation."""
        return Axis(-(-(self.length - number) // self.dilation), self.kernel, self.stride, 1, self.causal)

    def windows(self) -> tuple[Tensor, Tensor]:
        """First key and the key after the last, of every query, for an axis without dilation."""
        x = torch.arange(self.length)
        if self.causal:
            leader = (x // self.stride * self.stride + self.stride - 1).clamp(max=self.length - 1)
            return (leader - self.kernel + 1).clamp(min=0), x + 1
        leader = (x // self.stride * self.stride + self.stride // 2).clamp(max=self.length - 1)
        start = (leader - self.kernel // 2).clamp(0, self.length - self.kernel)
        return start, start + self.kernel

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether queries i see keys j, element by element; arithmetic only, so that it compiles."""
        group, x, y = i % self.dilation, i // self.dilation, j // self.dilation
        length = (self.length - group + self.dilation - 1) // self.dilation
        first = x // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(first + self.stride - 1, length - 1)
            near = (y >= leader - self.kernel + 1) & (y <= x)
        else:
            leader = torch.minimum(first + self.stride // 2, length - 1)
            start = torch.minimum((leader - self.kernel // 2).clamp(min=0), length - self.kernel)
            near = (y >= start) & (y < start + self.kernel)
        return near & (j % self.dilation == group)

    def offsets(self) -> Tensor:
        """`[length, length]` key minus query in units of dilation, plus k - 1: where a relative bias is read.

        Clamped into the table where the key is not in the window.
        """
        x = torch.arange(self.length) // self.dilation
        return (x - x[:, None] + self.kernel - 1).clamp(0, 2 * self.kernel - 2)


@dataclass(frozen=True)
class Tile:
    """Queries and the keys that they need, as (start, stop) of every axis, and which mask lies between them."""

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    pattern: tuple[int, ...]


@dataclass
class Plan:
    """A grid without dilation, cut into tiles. patterns: of every axis, the boolean `[t, r]` masks that occur."""

    axes: tuple[Axis, ...]
    tiles: list[Tile]
    patterns: list[list[Tensor]]
    _kept: dict[Any, Tensor | None] = field(default_factory=dict)
    _bytes: int = 0

    def mask(self, tile: Tile, like: Tensor) -> Tensor | None:
        """What to add to the scores of a tile, `[1 1 t r]` in the dtype of q; None where every query sees every key."""
        name = (tile.pattern, like.dtype, like.device)
        if name in self._kept:
            return self._kept[name]
        with torch.inference_mode(False), torch.no_grad():  # a mask made in inference mode could not be saved later
            seen = torch.ones((), dtype=torch.bool)
            rank = len(self.axes)
            for axis, number in enumerate(tile.pattern):
                one = self.patterns[axis][number]
                shape = [1] * (2 * rank)
                shape[axis], shape[rank + axis] = one.shape
                seen = seen & one.view(shape)
            made = None
            if not bool(seen.all()):
                rows, columns = (size(spans) for spans in (tile.queries, tile.keys))
                made = torch.zeros(rows, columns, dtype=like.dtype)
                made = made.masked_fill_(~seen.reshape(rows, columns), -torch.inf)[None, None].to(like.device)
        cost = 0 if made is None else made.numel() * made.element_size()
        if self._bytes + cost <= KEPT_BYTES:
            self._kept[name], self._bytes = made, self._bytes + cost
        return made

    def bias_index(self, tile: Tile, device: torch.device) -> Tensor:
        """`[t r]` which entry of the flattened relative bias each score of a tile gets."""
        name = ("bias", tile.pattern, _shift(tile), device)
        if name in self._kept:
            return self._kept[name]  # pyright: ignore[reportReturnType]
        with torch.inference_mode(False), torch.no_grad():
            rank, index = len(self.axes), torch.zeros((), dtype=torch.long)
            for number, axis in enumerate(self.axes):
                (q0, q1), (k0, k1) = tile.queries[number], tile.keys[number]
                offset = torch.arange(k0, k1) - torch.arange(q0, q1)[:, None] + axis.kernel - 1
                shape = [1] * (2 * rank)
                shape[number], shape[rank + number] = offset.shape
                index = index * (2 * axis.kernel - 1) + offset.clamp(0, 2 * axis.kernel - 2).view(shape)
            made = index.reshape(size(tile.queries), size(tile.keys)).to(device)
        cost = made.numel() * made.element_size()
        if self._bytes + cost <= KEPT_BYTES:
            self._kept[name], self._bytes = made, self._bytes + cost
        return made


def _shift(tile: Tile) -> tuple[int, ...]:
    return tuple(k[0] - q[0] for q, k in zip(tile.queries, tile.keys, strict=True))


def size(spans: Sequence[tuple[int, int]]) -> int:
    """Positions in a box."""
    found = 1
    for start, stop in spans:
        found *= stop - start
    return found


def tile_size(axis: Axis, rank: int) -> int:
    """Queries of a tile along one axis. Measured on CPUs: a tile about as wide as the window in two dimensions, 64
    to 128 queries in one; whole blocks where windows move in strides."""
    low, high = {1: (64, 128), 2: (4, 16), 3: (2, 6)}[rank]
    wanted = min(max(axis.kernel, low), high)
    if rank == 1:
        wanted = min(max(axis.kernel // 4, low), high)
    if axis.kernel == axis.length and not axis.causal:
        wanted = max(wanted, min(axis.length, high * 4))
    if axis.stride > 1:
        return min(-(-wanted // axis.stride) * axis.stride, axis.length)
    parts = -(-axis.length // min(wanted, axis.length))
    return -(-axis.length // parts)  # equal tiles


@lru_cache(maxsize=256)
def plan_of(axes: tuple[Axis, ...]) -> Plan:
    """The tiles of a grid without dilation."""
    cuts: list[list[tuple[tuple[int, int], tuple[int, int], int]]] = []
    patterns: list[list[Tensor]] = []
    with torch.inference_mode(False):
        for axis in axes:
            start, end = axis.windows()
            tile, cut, seen = tile_size(axis, len(axes)), [], []
            for first in range(0, axis.length, tile):
                last = min(first + tile, axis.length)
                low, high = int(start[first:last].min()), int(end[first:last].max())
                key = torch.arange(low, high)
                mask = (key >= start[first:last, None]) & (key < end[first:last, None])
                number = next((n for n, one in enumerate(seen) if torch.equal(one, mask)), len(seen))
                if number == len(seen):
                    seen.append(mask)
                cut.append(((first, last), (low, high), number))
            cuts.append(cut)
            patterns.append(seen)
    tiles = [
        Tile(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts))
        for parts in itertools.product(*cuts)
    ]
    return Plan(axes, tiles, patterns)


def groups_of(axes: Sequence[Axis]) -> list[tuple[tuple[slice, ...], tuple[Axis, ...]]]:
    """Dilation groups: which positions of every axis, and the axes of the group."""
    return [
        (
            tuple(slice(number, None, axis.dilation) for number, axis in zip(numbers, axes, strict=True)),
            tuple(axis.group(number) for number, axis in zip(numbers, axes, strict=True)),
        )
        for numbers in itertools.product(*(range(axis.dilation) for axis in axes))
    ]
