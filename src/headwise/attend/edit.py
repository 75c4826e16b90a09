"""What an edit is: a change of attention while a model runs, undone when its context ends.

Every edit names heads (None: all of the main tower), the rows that it touches (`when`) and its neutral setting, at
which it is the identity bit for bit. Edits act in three stages, each in the order given: on the inputs of a head
(`InputEdit`), on its weights (`GroupEdit` through the masses of key groups, `RowEdit` on whole rows, `ColumnEdit` on
rows as their columns demand), on its output (`OutputEdit`). To write your own, subclass one of the five.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout, select_heads
from headwise.attend.call import Call
from headwise.attend.groups import KeyGroup
from headwise.attend.read import Probe
from headwise.attend.step import Step

__all__ = ["ColumnEdit", "Edit", "GroupEdit", "InputEdit", "OutputEdit", "RowEdit", "Rows", "touched_rows"]

_SERIALS = itertools.count()
Heads = str | Iterable[Head | str] | None
When = Literal["all", "prompt", "generated"] | Callable[[Step], Tensor]


@dataclass(kw_only=True)
class Edit:
    """What all edits share.

    heads: a selection ("3.*,top:sink:4"), heads, or None for every head of the main tower.
    when: "all" rows, rows of the "prompt", rows of "generated" tokens, or a function from the `Step` to a boolean
        `[b, t]` over the rows of this forward.
    """

    heads: Heads = None
    when: When = "all"

    settles: ClassVar[bool] = False
    """Whether something is chosen at the last token of a prompt and kept: a longer prompt may then choose otherwise."""

    def __post_init__(self):
        if not callable(self.when) and self.when not in ("all", "prompt", "generated"):
            raise ValueError(
                f"{type(self).__name__}: when is {self.when!r}; choose all, prompt, generated or a function"
            )

    @cached_property
    def serial(self) -> int:
        """A number of this edit alone, under which it keeps things in `Step.carried`: they may outlive it there."""
        return next(_SERIALS)

    @property
    def neutral(self) -> bool:
        """True where this edit changes nothing; it is then skipped altogether."""
        return False

    def primitives(self) -> tuple["Edit", ...]:
        """The edits that do the work: an edit by itself, a method the primitives that it is made of."""
        return (self,)

    def attached(self, model: Any, select: Callable[[Heads], list[Head]]) -> tuple["Edit", ...]:
        """The edits that do the work on one model, asked for when it is steered; `primitives` where they are the same
        on all models.

        select: the heads of this model that a selection names.
        """
        return self.primitives()

    def named(self, layout: Layout, scores: Callable[[str], Mapping[Head, float | None]] | None = None) -> list[Head]:
        """The heads of a model that this edit changes."""
        return select_heads(self.heads, layout, scores=scores)

    def watch(self, model: nn.Module, step: Callable[[], Step | None]) -> Iterable[Callable[[], Any]]:
        """Hang hooks on a model to read what attention does not show; return what takes them down again.

        Called once, when the edit is attached and before anything is changed: a model in which the edit cannot work is
        refused here. step: gives the forward that the main tower is in. What was found about a sequence belongs in
        `Step.carried`, which lasts as long as its cache; `primitives` makes new edits for every context, so that no
        two contexts share what an edit keeps in itself.
        """
        return ()

    def probes(self) -> tuple[Probe, ...]:
        """Probes that read for this edit while it is attached; asked for after `watch`."""
        return ()

    def key_groups(self) -> tuple[KeyGroup, ...]:
        """The key groups that this edit names."""
        return ()

    def rows(self, call: Call) -> Literal[True] | Literal[False] | Tensor:
        """Which rows of a call are touched: all (True), none (False), or a boolean `[b, t]`."""
        if callable(self.when):
            return self.when(call.step)
        return self.when == "all" or (self.when == "generated") == call.step.generating


class InputEdit(Edit):
    """Changes what a head computes its attention from."""

    def change(self, call: Call) -> Call:
        """Return the call with other q, k, v or mask. Every head of the call is named, and has keys of its own."""
        raise NotImplementedError


class OutputEdit(Edit):
    """Changes the output of a head, before the output projection mixes heads."""

    def change(self, out: Tensor, call: Call) -> Tensor:
        """`[b t h e]` of the named heads (numbered by `call.heads`) to the same shape.

        out may be a view of the outputs of all heads: return new values, do not write into it.
        """
        raise NotImplementedError


class GroupEdit(Edit):
    """Changes the masses of key groups; what lies inside a group, and inside the rest, keeps its proportions."""

    def groups(self, call: Call) -> tuple[KeyGroup, ...]:
        """The key groups in a layer; always equally many."""
        return self.key_groups()

    def constant(self, call: Call) -> list[Tensor | float] | None:
        """For each group a number that is added to its scores, or `[h]` numbers, if that is all this edit does;
        otherwise None."""
        return None

    def reweigh(self, log_mass: Tensor, inside: Tensor, call: Call) -> Tensor:
        """New log-masses of the atoms of a row.

        log_mass: `[b h t a]`; exponentials sum to 1, the last atoms being the rest and the sink column.
        inside: `[g, a]` boolean, which atoms make up each of this edit's groups. call: of these rows; what they see is
        in the masses, and need not be in its mask.
        """
        raise NotImplementedError


class RowEdit(Edit):
    """Changes whole rows of weights: they are formed block by block, for the named heads only.

    any_rows: `change` learns from `rows` alone which rows it is shown, so that it may be given a call of only the last
    rows when the earlier ones are not touched.
    """

    any_rows: ClassVar[bool] = False

    def added(self, rows: "Rows") -> Tensor | None:
        """What is added to the scores of rows, finite and broadcastable to `[b h r s]`, if that is all this edit does.

        Asked for where no edit comes before it: the rows are then formed with it, and `change` is not called.
        """
        return None

    def change(self, weights: Tensor, rows: "Rows") -> Tensor:
        """`[b h r s]` float32 weights of the named heads to the same shape."""
        raise NotImplementedError


class ColumnEdit(RowEdit):
    """Changes rows by what columns received: it is shown all rows of a call before it changes any."""

    def shown(self, call: Call) -> bool:
        """Whether the rows of this call have been shown, by `fused` or by `begin`, `show` and `end`."""
        raise NotImplementedError

    def begin(self, call: Call) -> None:
        """The rows of a call follow, in order, in blocks."""

    def show(self, weights: Tensor, rows: "Rows") -> None:
        """`[b h r s]` weights of the named heads, as the edits before have left them."""
        raise NotImplementedError

    def end(self, call: Call) -> None:
        """All rows have been shown."""

    def fused(self, call: Call) -> Tensor | None:
        """`[b h t e]` outputs by a way shorter than rows, asked for where no other edit names these heads; or None."""
        return None


@dataclass
class Rows:
    """The rows that a `RowEdit` is shown: `index` `[r]` of the call's rows, and the call itself.

    named: all heads of this layer that the edit names; the call may hold some of them. sink: `[b h r 1]` the weight of
    the learned sink column, in families that have one; an edit may set it anew.
    """

    call: Call
    index: slice | Tensor
    columns: int | None = None
    named: list[int] | None = None
    sink: Tensor | None = None

    def own(self, x: Tensor) -> Tensor:
        """Of a tensor `[.. h t s]` over the named heads, the part of the heads of this call."""
        if x.ndim < 3 or x.shape[-3] == 1 or self.named is None:
            return x
        if x.shape[-3] != len(self.named):
            raise ValueError(
                f"a tensor for {x.shape[-3]} heads, but {len(self.named)} heads of layer {self.call.layer} are named"
            )
        return x[..., [self.named.index(head) for head in self.call.heads], :, :]

    @property
    def scores(self) -> Tensor:
        """`[b h r s]` scores of the rows, as the softmax sees them; those from which the rows were formed, if kept."""
        index, columns, scores = self.call.memo.get("scores", (None, None, None))
        same = index is self.index and columns == self.columns
        return scores if same else self.call.scores(self.index, self.columns)

    @property
    def visible(self) -> Tensor:
        """Boolean, broadcastable to `[b h r s]`: the keys that a row may see."""
        s = self.call.k.shape[2] if self.columns is None else self.columns
        row = torch.arange(self.call.q.shape[2], device=self.call.q.device)[self.index]
        zero = torch.zeros(1, 1, len(row), s, device=self.call.q.device)
        shown = self.call.masked(zero, self.index, s)
        return shown > torch.finfo(torch.float32).min / 2

    @property
    def positions(self) -> Tensor:
        """`[r]` absolute positions of the rows; columns start at `call.key_offset`."""
        return torch.arange(self.call.q.shape[2], device=self.call.q.device)[self.index] + self.call.row_offset


def touched_rows(edit: Edit, call: Call) -> bool | Tensor:
    """`edit.rows(call)` for a call that may hold only the last rows of its forward."""
    rows = call.rows.get(id(edit))
    if rows is None:
        rows = call.rows[id(edit)] = edit.rows(call)
    return rows[:, -call.q.shape[2] :] if isinstance(rows, Tensor) else rows
