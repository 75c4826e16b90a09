"""Attention masks: boolean (True = may attend) or additive floats, broadcastable to `[b h t s]`.

What is derived from a mask (its additive copy, its empty rows, its key mask) is kept with the mask object, weakly, so
that it is made once per forward and not once per layer. A mask changed in place is seen by its version counter; masks
without one (made under `torch.inference_mode`) are derived anew each time.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["additive", "decompose", "empty_rows", "hide_exactly", "key_mask", "triangle", "visible"]

_memo = WeakIdKeyDictionary()  # mask -> {what was asked: (version of the mask, answer)}
_Answer = TypeVar("_Answer")


def _once(mask: Tensor, question: Hashable, answer: Callable[[], _Answer]) -> _Answer:
    """The answer, remembered for as long as the mask lives. It must not refer to the mask, or neither is ever freed."""
    if torch.compiler.is_compiling() or mask.is_inference() or mask.requires_grad:
        return answer()
    if mask not in _memo:
        _memo[mask] = {}
    known = _memo[mask]
    if question not in known or known[question][0] != mask._version:
        known[question] = (mask._version, answer())
    return known[question][1]


def additive(mask: Tensor, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """The mask as numbers to add to scores: 0 where a boolean mask is True, -inf where it is False.

    An additive mask is converted to `dtype`; it is returned unchanged when it already has it.
    """
    if mask.dtype == dtype:
        return mask

    def answer() -> Tensor:
        if mask.dtype == torch.bool:
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        return mask.to(dtype)

    return _once(mask, ("additive", dtype), answer)


def hide_exactly(mask: Tensor) -> Tensor:
    """An additive mask with -inf where it holds (about) the least number of its dtype; a boolean one as it is.

    Models mask with `finfo.min`; a row that sees nothing then attends evenly to all keys, future ones included.
    """
    if mask.dtype == torch.bool:
        return mask
    return _once(mask, "exactly", lambda: mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf))


def visible(
    mask: Tensor | None, causal: bool, t: int, s: int, device: torch.device | None = None, *, rows: slice | None = None
) -> Bool[Tensor, "..."] | None:
    """Which columns each row may attend to, broadcastable to `[b h r s]`; None where nothing is hidden.

    Of an additive mask only -inf hides. causal: row i sees columns up to i (upper-left aligned).
    rows: a block of rows, all of them when None.
    """
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        if rows is not None and seen.ndim > 1 and seen.shape[-2] > 1:
            seen = seen[..., rows, :]
    if causal:
        device = device if mask is None else mask.device
        row = torch.arange(t, device=device)
        triangle = torch.arange(s, device=device) <= (row if rows is None else row[rows])[:, None]
        seen = triangle if seen is None else seen & triangle
    return seen


def empty_rows(mask: Tensor | None, causal: bool, t: int, s: int) -> Bool[Tensor, "..."] | None:
    """Rows that see no column at all, broadcastable to `[b h t]`; None where the arguments alone exclude them.

    Of an additive mask only -inf hides: a row of `finfo.min` is a row of equal biases.
    """
    if s == 0:
        return torch.ones(t, dtype=torch.bool, device=None if mask is None else mask.device)
    if mask is None:
        return None  # under the causal flag row 0 still sees column 0

    def answer() -> Tensor:
        seen = mask if mask.dtype == torch.bool else mask != -torch.inf
        if not causal:
            return ~seen.any(-1)
        if seen.ndim > 1 and seen.shape[-2] > 1:
            return ~(seen & torch.ones(t, s, dtype=torch.bool, device=mask.device).tril()).any(-1)
        # A key mask under the causal flag: row i is empty while no column up to i has been visible.
        seen = seen if seen.ndim == 1 else seen[..., 0, :]
        seen = seen.expand(*seen.shape[:-1], s).cumsum(-1) > 0
        return ~seen[..., torch.arange(t, device=mask.device).clamp(max=s - 1)]

    return _once(mask, ("empty", causal, t, s), answer)


def decompose(mask: Tensor) -> Bool[Tensor, "b 1 1 s"] | None:
    """The key mask of a square boolean mask that is causal and hides padding, or None for any other mask.

    The causal flag with the key mask gives bit-identical results, at the cost of no mask at all. Looks at the values:
    one synchronisation per mask object on a GPU, and None where there are none to look at (meta, while compiling).
    """
    return triangle(mask, 0) if mask.ndim == 4 and mask.shape[2] == mask.shape[3] else None


def triangle(mask: Tensor, offset: int) -> Bool[Tensor, "b 1 1 s"] | None:
    """The key mask of a boolean mask `[b 1 t s]` whose row i sees, of the columns that the last row sees, those up to
    `offset + i`; None for any other mask. Such are the masks of a prompt that goes on behind a cache.

    As `decompose`, it looks at the values.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] == 0 or mask.is_meta or torch.compiler.is_compiling():
        return None

    def answer() -> Tensor | None:
        keys = mask[:, :, -1:].clone()  # the last row sees every column that is not padding
        return keys if torch.equal(mask, keys & torch.ones_like(mask[:1]).tril(offset)) else None

    return _once(mask, ("triangle", offset), answer)


def key_mask(mask: Tensor) -> Bool[Tensor, "b s"] | None:
    """The keys that every row may see, of a mask `[b 1 t s]` whose rows are all alike; None for any other mask.

    Of an additive mask what is about `finfo.min` or less hides, and anything else than 0 makes it another mask. Looks
    at the values: one synchronisation per mask object on a GPU.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] == 0:
        return None

    def answer() -> Tensor | None:
        first = mask[:, :, :1]
        if mask.shape[2] > 1 and not bool((mask == first).all()):
            return None
        if mask.dtype == torch.bool:
            return first[:, 0, 0].clone()
        hidden = first <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (first == 0)).all()):
            return None
        return ~hidden[:, 0, 0]

    return _once(mask, "keys", answer)
