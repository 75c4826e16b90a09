"""Edits on key groups without rows of weights: split the keys into atoms, merge by log-sum-exp.

The groups that edits name cut the keys into *atoms* (keys that belong to the same groups) and the rest. Attention over
each atom gives an output and a log-sum-exp; an edit is then arithmetic on a few log-masses per row. Nothing is ever
subtracted, so it is exact at every mass and in bf16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.edit import GroupEdit, touched_rows
from headwise.ops.softmax import log_sum_exp

__all__ = ["key_bias", "merge_sets", "regroup_rows", "split_and_merge"]

SMALL = 64  # up to so many keys, or an eighth of all, an atom is cheaper by a direct product than by a fused call
FEW_GROUPS = 3  # for a decoded token; they make eight atoms
DIRECT_BYTES = 2**26  # of weights formed by a direct product
NOTHING = -1.5e4  # a log-mass below it is that of keys which are hidden
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
    total = None
    for edit in edits:
        constants = edit.constant(call)
        if constants is None or edit.rows(call) is not True:
            return None
        for group, constant in zip(edit.groups(call), constants, strict=True):
            if not bool((constant.abs() <= LARGEST_FOLDED_BIAS).all()):
                return None
            inside = call.columns(group.members(call.key_step))
            one = constant[:1] if bool((constant == constant[0]).all()) else constant
            bias = inside[:, None, None].to(one.dtype) * one[None, :, None, None]
            total = bias if total is None else total + bias
    if total is None:
        return None
    dense = call.mask is not None and call.mask.shape[2] > 1
    # A dense mask and a bias that differs from head to head would make a mask per head: merging is cheaper.
    return None if dense and total.shape[1] > 1 else total


def split_and_merge(call: Call, edits: Sequence[GroupEdit]) -> Tensor:
    """`[b h t e]` attention under edits on key groups."""
    if call.q.shape[2] == 1 and 0 < sum(len(edit.groups(call)) for edit in edits) <= FEW_GROUPS:
        return _one_row(call, edits)
    atoms, inside, rest = _atoms(call, edits)
    outs, lses = zip(*[_attend_atom(call, atom) for atom in atoms], call.attend(only=rest), strict=True)
    log_mass = torch.stack([*lses, *_sink_column(call, lses[0])], -1)
    log_mass = _reweigh(log_mass, inside, edits, call)
    return _merged(outs, log_mass).to(call.q.dtype)


def _one_row(call: Call, edits: Sequence[GroupEdit]) -> Tensor:
    """The same for a decoded token, in few small steps: its row of scores is formed and shifted atom by atom."""
    groups = tuple(group for edit in edits for group in edit.groups(call))
    s = call.k.shape[2]
    codes, atoms, inside = call.key_step.once(("one row", groups, s), lambda: _codes(call, groups))
    scores = call.scores(slice(None))  # b h 1 s
    lse = log_sum_exp(scores[..., None, :].masked_fill(~atoms[:, None, None], -torch.inf))
    lse = lse.masked_fill(lse < NOTHING, -torch.inf)
    log_mass = _reweigh(
        torch.cat([lse, *(x[..., None] for x in _sink_column(call, lse[..., 0]))], -1), inside, edits, call
    )
    shift = (log_mass[..., : lse.shape[-1]] - lse.masked_fill(torch.isneginf(lse), 0)).masked_fill(
        torch.isneginf(lse), -torch.inf
    )
    b, h = scores.shape[:2]
    weights = (scores + shift.gather(-1, codes[:, None, None].expand(b, h, 1, s))).exp()
    out = weights.view(b, call.k.shape[1], call.groups, s) @ call.v.to(weights.dtype)
    return out.view(b, h, 1, -1).to(call.q.dtype)


def _codes(call: Call, groups: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The atom of every column `[b, s]`, the columns of every atom `[b, a, s]`, the atoms of every group `[g, a]`."""
    members = torch.stack([call.columns(group.members(call.key_step)) for group in groups])  # g b s
    power = torch.arange(len(groups), device=members.device)
    codes = (members.long() << power[:, None, None]).sum(0)
    every = torch.arange(2 ** len(groups), device=members.device)
    return codes, codes[:, None] == every[:, None], (every >> power[:, None] & 1).bool()


def _merged(outs: Sequence[Tensor], log_mass: Tensor) -> Tensor:
    mass = log_mass.exp()
    out = torch.zeros((), dtype=mass.dtype, device=mass.device)
    for i, part in enumerate(outs):
        out = out + mass[..., i, None] * part
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
    atoms, inside, rest = _atoms(call, [edit])
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
    blind = torch.isneginf(log_mass.amax(-1, keepdim=True))
    safe = torch.where(blind, 0.0, log_mass)
    total = safe.logsumexp(-1, keepdim=True)
    mass = safe - total if not every_row else safe
    first = 0
    for edit in edits:
        count = len(edit.groups(call))
        member = torch.zeros(count, width, dtype=torch.bool, device=log_mass.device)
        member[:, : inside.shape[1]] = inside[first : first + count]
        first += count
        new = edit.reweigh(mass, member, call)
        rows = True if every_row else touched_rows(edit, call)
        mass = torch.where(rows[:, None, :, None], new, mass) if isinstance(rows, Tensor) else new
    return torch.where(blind, -torch.inf, mass)


def _atoms(call: Call, edits: Sequence[GroupEdit]) -> tuple[list[Atom], Tensor, Tensor]:
    """Atoms, which groups they belong to `[g, a]`, and the columns `[b, s]` of the rest. Once per forward."""
    groups = tuple(group for edit in edits for group in edit.groups(call))
    step, s = call.key_step, call.k.shape[2]
    return step.once(("atoms", groups, s), lambda: _cut(call, groups))


def _cut(call: Call, groups) -> tuple[list[Atom], Tensor, Tensor]:
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
    return atoms, inside.view(len(groups), len(present)).to(members.device), codes == 0


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
