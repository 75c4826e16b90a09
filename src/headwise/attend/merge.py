"""Edits on key groups without rows of weights: split the keys into atoms, merge by log-sum-exp.

The groups that edits name cut the keys into *atoms* (keys that belong to the same groups) and the rest. Attention over
each atom gives an output and a log-sum-exp; an edit is then arithmetic on a few log-masses per row. Nothing is ever
subtracted, so it is exact at every mass and in bf16.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from headwise.attend._behind import rows_behind
from headwise.attend.call import Call
from headwise.attend.edit import GroupEdit, touched_rows
from headwise.attend.groups import KeyGroup, over_columns
from headwise.ops.softmax import log_sum_exp

__all__ = ["key_bias", "merge_sets", "regroup_rows", "split_and_merge"]

SMALL = 64  # up to so many keys, or an eighth of all, an atom is cheaper by a direct product than by a fused call
FEW_GROUPS = 3  # for a decoded token; they make eight atoms
DIRECT_BYTES = 2**26  # of weights formed by a direct product
NOTHING = -1.5e4  # a log-mass below it is that of keys which are hidden
HIDDEN = -1e30  # what is added to the score of a key that is hidden: finite, and nothing is left of the score
LARGEST_FOLDED_BIAS = 80.0  # beyond it a float32 score would lose digits; such constants are merged instead


@dataclass
class Atom:
    """Keys `[b, s]` that belong to the same groups; where they are few, their columns `[b, g]` and which are real.

    Each may have an axis of heads after the first.
    """

    keys: Tensor
    columns: Tensor | None
    real: Tensor | None


def key_bias(call: Call, edits: Sequence[GroupEdit]) -> Tensor | None:
    """The edits as one bias `[b|1, h|1, 1, s]` on the scores, where that is all they are; otherwise None.

    None too without edits.
    """
    shifts: list[tuple[KeyGroup, Tensor | float]] = []
    for edit in edits:
        constants = edit.constant(call)
        if constants is None or touched_rows(edit, call) is not True:
            return None
        shifts += zip(edit.groups(call), constants, strict=True)
    if not shifts:
        return None
    # The numbers for each head, or one for all.
    values = [tuple(set(one.tolist())) if isinstance(one, Tensor) else (one,) for _, one in shifts]
    if not all(abs(value) <= LARGEST_FOLDED_BIAS for one in values for value in one):
        return None
    # A dense mask and a bias that differs from head to head would make a mask per head: merging is cheaper.
    if call.mask is not None and call.mask.shape[2] > 1 and any(len(one) > 1 for one in values):
        return None

    groups = tuple(group for group, _ in shifts)
    constants = [constant for _, constant in shifts if not isinstance(constant, Tensor)]
    if len(constants) == len(shifts):
        key = ("key bias", *constants, call.work_dtype)
        return over_columns(call, key, groups, partial(_of_constants, constants, call.work_dtype))[0]
    inside = over_columns(call, ("inside", call.work_dtype), groups, partial(_numbers, call.work_dtype))[0]
    total = None
    for members, (_, constant), one in zip(inside, shifts, values, strict=True):
        if isinstance(constant, Tensor):
            constant = (constant if len(one) > 1 else constant[:1])[None, :, None, None]
        total = members * constant if total is None else total + members * constant
    return total


def _of_constants(constants: Sequence[float], dtype: torch.dtype, members: Tensor) -> tuple[Tensor, None]:
    parts = zip(members.to(dtype), constants, strict=True)
    return torch.stack([inside * constant for inside, constant in parts]).sum(0)[:, None, None], None


def _numbers(dtype: torch.dtype, members: Tensor) -> tuple[Tensor, None]:
    return members.to(dtype)[:, :, None, None], None


def split_and_merge(call: Call, edits: Sequence[GroupEdit], skip: int = 0) -> Tensor:
    """`[b h t e]` attention under edits on key groups, of the rows from `skip` on."""
    groups = tuple(group for edit in edits for group in edit.groups(call))
    count = call.q.shape[2] - skip
    if count == 1 and 0 < len(groups) <= FEW_GROUPS:
        return _one_row(call.last_rows(1), edits, groups)
    atoms, inside, rest, last = _atoms(call, groups)
    tail = rows_behind(call, [atom.keys for atom in atoms], rest, last, groups, skip)
    if tail is not None and tail.first == skip and call.causal:  # their triangle need not be written out
        rows = replace(call, q=call.q[:, :, skip:], causal=False, memo={})
    else:
        rows = call.last_rows(count)
    outs, lses = _attend_parts(rows, atoms, rest) if tail is None else tail.attend(call)
    if tail is not None and tail.first > skip:  # the rows before see a part of the groups
        parts = _attend_parts(_cut_off(rows, tail.first - skip), atoms, rest)
        outs, lses = (_joined(early, late) for early, late in zip(parts, (outs, lses), strict=True))
    log_mass = torch.stack([*lses, *_sink_column(rows, lses[0])], -1)
    log_mass = _reweigh(log_mass, inside, edits, rows)
    return _merged(outs, log_mass).to(call.q.dtype)


def _cut_off(call: Call, count: int) -> Call:
    """The first rows of a call, to attend with: its steps stay those of the whole."""
    mask = call.mask
    mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, :count]
    return replace(call, q=call.q[:, :, :count], mask=mask, memo={})


def _joined(early: list[Tensor], late: list[Tensor]) -> list[Tensor]:
    """Rows of the same atoms, one after the other; the late ones may have their rest in two parts."""
    nothing = -torch.inf if early[0].ndim == 3 else 0.0
    early = [*early, *(torch.full_like(early[-1], nothing) for _ in late[len(early) :])]
    return [torch.cat(pair, 2) for pair in zip(early, late, strict=True)]


def _attend_parts(call: Call, atoms: Sequence[Atom], rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-masses over every atom and, last, over the rest."""
    found = [*(_attend_atom(call, atom) for atom in atoms), call.attend(only=rest)]
    return [out for out, _ in found], [lse for _, lse in found]


def _one_row(call: Call, edits: Sequence[GroupEdit], groups: tuple) -> Tensor:
    """The same for a decoded token, in few small steps: the softmax of its scores over every atom by itself, and a row
    of weights that is their sum by the atoms' masses."""
    scores = call.scores(slice(None))  # b h 1 s
    if call.mask is not None:
        scores = scores.clamp_min(HIDDEN)  # a softmax over hidden keys alone is a number, too
    hidden, inside = over_columns(call, ("one row", call.work_dtype), groups, partial(_of_atoms, call.work_dtype))
    scores = scores + hidden  # b h a s
    shares = scores.softmax(-1)
    lse = (scores.amax(-1) - shares.amax(-1).log())[:, :, None]  # b h 1 a: the largest share is exp(score - lse)
    additive = call.mask is not None and call.mask.dtype != torch.bool
    lse = lse.masked_fill(lse < (NOTHING if additive else HIDDEN / 2), -torch.inf)
    log_mass = lse
    if call.sinks is not None:
        log_mass = torch.cat([lse, *(x[..., None] for x in _sink_column(call, lse[..., 0]))], -1)
    mass = _reweigh(log_mass, inside, edits, call)[..., : lse.shape[-1]].exp()
    b, h, a, s = shares.shape
    weights = torch.bmm(mass.reshape(b * h, 1, a), shares.view(b * h, a, s))
    n = call.k.shape[1]
    out = torch.bmm(weights.view(b * n, h // n, s), call.v.to(weights.dtype).reshape(b * n, s, -1))
    return out.view(b, h, 1, -1).to(call.q.dtype)


def _of_atoms(dtype: torch.dtype, members: Tensor) -> tuple[Tensor, Tensor]:
    """What hides the columns of others from every atom, `[b 1 a s]`, and the atoms of the groups `[g, a]`."""
    every, inside = _every_atom(len(members), members.device)
    codes = (members.long() << torch.arange(len(members), device=members.device)[:, None, None]).sum(0)
    hidden = torch.zeros(len(codes), len(every), codes.shape[1], dtype=dtype, device=codes.device)
    return hidden.masked_fill_(codes[:, None] != every[:, None], HIDDEN)[:, None], inside


@cache
def _every_atom(groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of all atoms that so many groups can make, and the atoms of every group `[g, a]`."""
    every = torch.arange(2**groups, device=device)
    return every, (every >> torch.arange(groups, device=device)[:, None] & 1).bool()


def _merged(outs: Sequence[Tensor], log_mass: Tensor) -> Tensor:
    mass = log_mass.exp()
    out = mass[..., 0, None] * outs[0]
    for i, part in enumerate(outs[1:], 1):
        out = torch.addcmul(out, mass[..., i, None], part.to(out.dtype))
    return out


def merge_sets(call: Call, keys: Tensor, edit: GroupEdit) -> Tensor:
    """`[b h t e]` attention under an edit on one key group, here a set of keys `[b h s]` for every head.

    The edit is asked for its arithmetic on masses only, never for the members of its group.
    """
    most = int(keys.sum(-1).max())
    atom = Atom(keys, None, None)
    if most <= SMALL or most * 8 <= keys.shape[-1]:
        columns = keys.int().sort(dim=-1, descending=True, stable=True).indices[..., :most]
        atom = Atom(keys, columns, keys.gather(2, columns))
    (own, own_lse), (other, other_lse) = _attend_atom(call, atom), call.attend(only=~keys)
    log_mass = torch.stack([own_lse, other_lse, *_sink_column(call, own_lse)], -1)
    blind = torch.isneginf(log_mass.amax(-1, keepdim=True))
    safe = torch.where(blind, 0.0, log_mass)
    inside = (torch.arange(log_mass.shape[-1], device=keys.device) == 0)[None]
    new = edit.reweigh(safe - safe.logsumexp(-1, keepdim=True), inside, call)
    return _merged([own, other], torch.where(blind, -torch.inf, new)).to(call.q.dtype)


def regroup_rows(call: Call, edit: GroupEdit, weights: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same edit on rows of weights `[b h r s]` and their sink column `[b h r 1]`, if they have one.

    For probes, and for heads whose rows are formed anyway.
    """
    atoms, inside, rest, _ = _atoms(call, edit.groups(call))
    keys = torch.stack([*(atom.keys for atom in atoms), rest], 1)[..., : weights.shape[-1]]  # b a s
    mass = torch.einsum("bhrs,bas->bhra", weights, keys.to(weights.dtype))
    mass = mass if sink is None else torch.cat([mass, sink], -1)
    gone = mass <= 0
    old = mass.masked_fill(gone, 1).log().masked_fill(gone, -torch.inf)
    new = _reweigh(old, inside, [edit], call, every_row=True)
    change = (new - old.masked_fill(gone, 0)).exp()
    weights = weights * torch.einsum("bhra,bas->bhrs", change[..., : keys.shape[1]], keys.to(weights.dtype))
    return weights, None if sink is None else sink * change[..., -1:]


def _reweigh(log_mass: Tensor, inside: Tensor, edits: Sequence[GroupEdit], call: Call, every_row=False) -> Tensor:
    """Normalise, apply the edits in order to the rows that they touch; rows that see nothing keep masses of 0."""
    width = log_mass.shape[-1]
    blind, mass = None, log_mass
    if call.mask is not None:  # otherwise every row sees a key
        blind = torch.isneginf(log_mass.amax(-1, keepdim=True))
        mass = torch.where(blind, 0.0, log_mass)
    if not every_row:
        mass = mass.log_softmax(-1)
    first = 0
    for edit in edits:
        count = len(edit.groups(call))
        member = inside if count == len(inside) else inside[first : first + count]
        if width > member.shape[1]:
            member = torch.nn.functional.pad(member, (0, width - member.shape[1]))
        first += count
        new = edit.reweigh(mass, member, call)
        rows = True if every_row else touched_rows(edit, call)
        mass = torch.where(rows[:, None, :, None], new, mass) if isinstance(rows, Tensor) else new
    return mass if blind is None else torch.where(blind, -torch.inf, mass)


def _atoms(call: Call, groups: tuple) -> tuple[list[Atom], Tensor, Tensor, int]:
    """Atoms, which groups they belong to `[g, a]`, the columns `[b, s]` of the rest, and the column behind the last of
    an atom. Once per forward."""
    step, s = call.key_step, call.k.shape[2]
    return step.once(("atoms", groups, s), lambda: _cut(call, groups))


def _cut(call: Call, groups: tuple) -> tuple[list[Atom], Tensor, Tensor, int]:
    members = torch.stack([call.columns(group.members(call.key_step)) for group in groups])  # g b s
    codes = (members.long() << torch.arange(len(groups), device=members.device)[:, None, None]).sum(0)
    present = [code for code in codes.unique().tolist() if code]
    atoms = []
    for code in present:
        keys = codes == code
        most = int(keys.sum(-1).max())
        b, h, t, _ = call.q.shape
        if most <= SMALL or (most * 8 <= call.k.shape[2] and 4 * b * h * t * most <= DIRECT_BYTES):
            order = keys.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
            atoms.append(Atom(keys, order, keys.gather(1, order)))
        else:
            atoms.append(Atom(keys, None, None))
    inside = torch.tensor([[bool(code >> g & 1) for code in present] for g in range(len(groups))])
    ends = (codes > 0).any(0).nonzero()
    last = int(ends[-1]) + 1 if len(ends) else 0
    return atoms, inside.view(len(groups), len(present)).to(members.device), codes == 0, last


def _attend_atom(call: Call, atom: Atom) -> tuple[Tensor, Tensor]:
    if atom.columns is None or atom.real is None:
        return call.attend(only=atom.keys)
    b, h, t, _ = call.q.shape
    each = atom.columns.ndim == 3  # other keys for every head
    real = atom.real[:, :, None] if each else atom.real[:, None, None]
    scores = call.scores(slice(None), atom.columns).masked_fill(~real, -torch.inf)
    lse = log_sum_exp(scores)
    lse = lse.masked_fill(lse < NOTHING, -torch.inf)  # masks of finfo.min hide as those of -inf do
    weights = (scores - lse.masked_fill(torch.isneginf(lse), 0)[..., None]).exp()
    if each:
        return weights @ call.at_columns(call.v, atom.columns).to(weights.dtype), lse
    value = call.v.gather(2, atom.columns[:, None, :, None].expand(-1, call.v.shape[1], -1, call.v.shape[3]))
    out = weights.reshape(b, call.k.shape[1], call.groups * t, -1) @ value.to(weights.dtype)
    return out.view(b, h, t, -1), lse


def _sink_column(call: Call, like: Tensor) -> list[Tensor]:
    """The learned sink column, an atom that carries no value and belongs to no group."""
    if call.sinks is None:
        return []
    return [call.sinks.to(like.dtype)[None, :, None].expand_as(like)]
