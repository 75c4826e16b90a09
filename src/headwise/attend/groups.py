"""Key groups: sets of key positions, named once and used by every probe and edit.

A group is a rule from a `Step` (ids, padding, what was prompt) to a boolean mask over absolute token positions. It is
asked again at every forward; a rule that looks only at the prompt gives the same answer while tokens are generated.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.step import Step

__all__ = ["KeyGroup", "first_token", "image_tokens", "key_group", "positions", "recent", "spans", "tokens"]


@dataclass(frozen=True)
class KeyGroup:
    """A set of key positions.

    rule: `Step -> [b, total]` boolean over absolute positions. options: what `key_group(name, **options)` needs to
    make it again. uses_generated: the rule may select generated tokens (refused under beam search, where the
    generated tokens of a row change owner). settled: the rule never selects a generated token, and of the prompt the
    same while tokens are generated, so that it need not be asked again.
    """

    name: str
    rule: Callable[[Step], Tensor] = field(compare=False, repr=False)
    options: tuple[tuple[str, object], ...] = ()
    uses_generated: bool = False
    settled: bool = field(default=False, compare=False)
    _own: object = field(default=None, init=False, repr=False)
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.name not in _MAKERS:  # a function of the user's own: its name does not say what it selects
            object.__setattr__(self, "_own", self.rule)
        # Groups are looked up in every layer and forward, and may hold many numbers.
        object.__setattr__(self, "_hash", hash((self.name, self.options, self.uses_generated, self._own)))

    def __hash__(self) -> int:
        return self._hash

    def members(self, step: Step) -> Tensor:
        """`[b, total]` boolean; padding is never a member."""
        return step.once(("group", self), lambda: self._resolve(step))

    def _resolve(self, step: Step) -> Tensor:
        if not self.settled:
            return self._asked(step)
        known = step.carried.get(("members", self)) if step.generating else None
        if known is not None and known.shape == (len(step.real), step.past) and known.device == step.real.device:
            members = torch.nn.functional.pad(known, (0, step.length))
        else:
            members = self._asked(step)
            if not bool(step.real.any(-1).all()):  # a sequence of padding alone has yet to begin
                return members
        step.carried["members", self] = members
        return members

    def _asked(self, step: Step) -> Tensor:
        members = self.rule(step)
        if members.shape[-1] != step.total:
            raise ValueError(
                f"key group {self.name!r}: its mask covers {members.shape[-1]} positions but the sequence has "
                f"{step.total}; give a mask over absolute positions, cached ones included"
            )
        return members & step.real

    def to_json(self) -> dict:
        """A document that `key_group` turns back into the same group."""
        if self.name not in _MAKERS:
            raise ValueError(f"key group {self.name!r} was made from a function of your own and cannot be saved")
        return {"name": self.name, **dict(self.options)}


SPARE = 256  # columns, for tokens to come


@dataclass
class _Kept:
    """What was made of settled groups, over absolute positions and some more; total: of the last step that it served.

    Valid while the same sequences go on token by token: a generated token is in no settled group.
    """

    columns: Tensor
    more: Any
    batch: int
    total: int

    def serves(self, step: Step, stop: int) -> bool:
        return self.total in (step.past, step.total) and self.batch == step.batch and stop <= self.columns.shape[-1]


def over_columns(
    call: Call, key: Hashable, groups: tuple[KeyGroup, ...], make: Callable[[Tensor], tuple[Tensor, Any]]
) -> tuple[Tensor, Any]:
    """`make(members)` over the columns of a call: a tensor `[.. s]`, and anything that goes with it.

    members: `[g b s]` boolean. make works column by column and depends on nothing else than `key` says; in what goes
    with its tensor columns in no group make no difference. It is called once a forward; of settled groups once a
    sequence, with columns to spare for the tokens to come, so that a decoded token costs a slice.
    """
    step, s = call.key_step, call.k.shape[2]
    here = (key, groups, s, str(call.k.device))
    found = step.cache.get(here)
    if found is not None:
        return found
    found = _kept_columns(call, here, groups, make) if step.generating and all(g.settled for g in groups) else None
    if found is None:
        found = make(torch.stack([call.columns(group.members(step)) for group in groups]))
    step.cache[here] = found
    return found


def _kept_columns(
    call: Call, here: tuple, groups: tuple[KeyGroup, ...], make: Callable[[Tensor], tuple[Tensor, Any]]
) -> tuple[Tensor, Any] | None:
    """The same from what is kept with the sequence; None where nothing can be kept yet."""
    step, first = call.key_step, call.key_offset
    stop, place = first + call.k.shape[2], ("columns", here[0], groups, here[3])
    known = step.carried.get(place)
    if known is None or not known.serves(step, stop):
        members = [group.members(step) for group in groups]
        if any(step.carried.get(("members", g)) is not own for g, own in zip(groups, members, strict=True)):
            return None  # a sequence has yet to begin
        missing = max(stop, step.total) + SPARE - step.total
        columns, more = make(torch.nn.functional.pad(torch.stack(members), (0, missing)))
        known = step.carried[place] = _Kept(columns, more, step.batch, step.total)
    known.total = step.total
    return known.columns[..., first:stop], known.more


def first_token() -> KeyGroup:
    """The first real token of each sequence (BOS where the tokenizer adds one)."""

    def rule(step: Step) -> Tensor:
        return torch.nn.functional.one_hot(step.first, step.total).bool()

    return KeyGroup("first", rule, settled=True)


def recent(n: int) -> KeyGroup:
    """The last n tokens seen so far; recomputed at every generated token."""
    if n < 1:
        raise ValueError(f"recent: n is {n}; it must be at least 1")

    def rule(step: Step) -> Tensor:
        index = torch.arange(step.total, device=step.real.device)
        return (index >= step.total - n).expand_as(step.real)

    return KeyGroup("recent", rule, (("n", n),), uses_generated=True)


def spans(ranges: Sequence[tuple[int, int]]) -> KeyGroup:
    """Positions `start <= j < stop` of each range, counted from the first real token of each sequence."""
    frozen = tuple((int(start), int(stop)) for start, stop in ranges)
    for start, stop in frozen:
        if not 0 <= start < stop:
            raise ValueError(f"spans: ({start}, {stop}) is empty or negative; give 0 <= start < stop")

    def rule(step: Step) -> Tensor:
        last = max(stop for _, stop in frozen)
        longest = int(step.real.sum(-1).max())
        if last > longest:
            raise ValueError(f"spans: ({last - 1}, {last}) lies beyond the prompt of {longest} tokens")
        index = torch.arange(step.total, device=step.real.device) - step.first[:, None]
        inside = torch.zeros_like(step.real)
        for start, stop in frozen:
            inside |= (index >= start) & (index < stop)
        return inside

    return KeyGroup("spans", rule, (("ranges", frozen),), settled=True)


def image_tokens() -> KeyGroup:
    """The image tokens of the prompt. Raises ValueError on a model or prompt that has none."""

    def rule(step: Step) -> Tensor:
        if step.images is None:
            raise ValueError("image_tokens: this model has no image token, or its ids were not given as input_ids")
        return step.images

    return KeyGroup("image", rule, settled=True)


def tokens(ids: Iterable[int], *, prompt_only: bool = True) -> KeyGroup:
    """Every position that holds one of these token ids."""
    wanted = tuple(sorted({int(i) for i in ids}))
    if not wanted:
        raise ValueError("tokens: no ids were given; name at least one token id")

    def rule(step: Step) -> Tensor:
        found = torch.isin(step.ids, torch.tensor(wanted, device=step.ids.device))
        return found & step.prompt if prompt_only else found

    return KeyGroup("tokens", rule, (("ids", wanted), ("prompt_only", prompt_only)), not prompt_only, prompt_only)


def positions(members: Tensor | Sequence[int]) -> KeyGroup:
    """Fixed absolute positions: a boolean `[b, n]` or `[n]`, or a list of indices. Later tokens are not members.

    Unlike `spans`, padding counts: position 0 is column 0 of the batch.
    """
    if isinstance(members, Tensor) and members.dtype == torch.bool:
        mask = members if members.ndim == 2 else members[None]
    else:
        index = torch.as_tensor(members)
        if index.numel() == 0 or int(index.min()) < 0:
            raise ValueError(f"positions: {members} must be a boolean mask or non-negative indices")
        mask = torch.zeros(1, int(index.max()) + 1, dtype=torch.bool)
        mask[0, index] = True
    options = tuple(torch.nonzero(mask[0]).flatten().tolist()) if mask.shape[0] == 1 else ()

    def rule(step: Step) -> Tensor:
        if mask.shape[0] not in (1, step.real.shape[0]):
            raise ValueError(f"positions: the mask has {mask.shape[0]} rows but the batch has {step.real.shape[0]}")
        inside = mask.to(step.real.device)[:, : step.total]
        inside = torch.nn.functional.pad(inside, (0, step.total - inside.shape[1]))
        return inside.expand(step.real.shape[0], -1)

    # The mask itself is part of the identity: two groups of different positions must never share a cache entry.
    identity = ("members", options) if options else ("members", id(mask))
    return KeyGroup("positions", rule, (identity,))


_MAKERS: dict[str, Callable[..., KeyGroup]] = {
    "first": first_token,
    "recent": recent,
    "spans": spans,
    "image": image_tokens,
    "tokens": tokens,
    "positions": positions,
}


def key_group(name: str, **options) -> KeyGroup:
    """Make a group by name: first, recent(n), spans(ranges), image, tokens(ids), positions(members)."""
    if name not in _MAKERS:
        raise ValueError(f"key group {name!r} is unknown; choose from {', '.join(sorted(_MAKERS))}")
    return _MAKERS[name](**options)
