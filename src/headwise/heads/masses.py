"""How much of its attention a row gives to named groups of keys, for every head: one forward, no weights kept.

    mass(h, G) = mean over rows t of sum_{j in G} A_h[t, j]
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head, select_heads
from headwise.attend.groups import KeyGroup, positions
from headwise.attend.read import Probe, Reading
from headwise.hf.addresses import layout
from headwise.hf.inputs import as_inputs, frugal
from headwise.hf.session import probe

__all__ = ["group_mass"]

FEW = 16  # so many rows are formed whole; more of them are read in blocks
Rows = int | Sequence[int] | Int[Tensor, " b"] | Bool[Tensor, "b t"]


def group_mass(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    groups: Mapping[str, KeyGroup | Bool[Tensor, "b s"]],
    *,
    rows: Rows = -1,
    reduce: Literal["mean", "max"] = "mean",
    heads: str | Iterable[Head | str] | None = None,
) -> dict[str, Float[Tensor, "b l h"]]:
    """The mass that every head of the main tower puts on each group, in one forward; open edits act.

    inputs: token ids `[b, t]`, or what a tokenizer returned. groups: name -> a key group, or its members as a boolean
    `[b, s]` over the columns of the batch (padding is never a member). rows: which queries are read: one position for
    all sequences, negative from the end; `[b]` (or a list of b), one for each sequence; or a boolean `[b, t]`.
    reduce: over the rows of one sequence. heads: those to read; None is all. Masses lie in 0..1; heads that were not
    read, and sequences without a row, are nan.

    Raises ValueError for no groups, a mask of another shape, and a row that the sequences have not.

    >>> group_mass(model, ids, {"first": first_token()})["first"].shape  # doctest: +SKIP
    torch.Size([2, 3, 8])
    """
    if not groups:
        raise ValueError("group_mass: groups is empty; name at least one group of keys")
    if reduce not in ("mean", "max"):
        raise ValueError(f"group_mass: reduce is {reduce!r}; choose mean or max")
    given = as_inputs(model, inputs)
    shape = _shape(given)
    main = layout(model).main
    chosen = set(select_heads(heads, layout(model)))
    made = {name: _as_group(name, group, shape) for name, group in groups.items()}
    reader = _Masses(made, _as_rows(rows, shape), reduce)
    with torch.no_grad(), probe(model, reader):
        model(**{**frugal(model), **given})
    result = {}
    for name in groups:
        table = torch.full((shape[0], main.layers, max(main.heads)), torch.nan)
        for (tower, layer), masses in reader.found[name].items():
            if tower == main.name:
                table[:, layer, : masses.shape[1]] = masses.float().cpu()
        for head in layout(model).heads(main.name):
            if head not in chosen:
                table[:, head.layer, head.head] = torch.nan
        result[name] = table
    return result


class _Masses(Probe):
    """Masses of groups from chosen rows, per sequence."""

    def __init__(self, groups: Mapping[str, KeyGroup], rows: Bool[Tensor, "b t"], reduce: str):
        super().__init__()
        self.groups, self.rows, self.reduce = groups, rows, reduce
        self.found: dict[str, dict[tuple[str, int], Tensor]] = {name: {} for name in groups}

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        if call.q.shape[2] != self.rows.shape[1] or call.q.shape[0] != self.rows.shape[0]:
            return  # a tower that reads something else
        rows = self.rows.to(call.q.device)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.groups}
        members = {name: call.columns(group.members(call.key_step)) for name, group in self.groups.items()}
        index = rows.any(0).nonzero()[:, 0]
        for weights in _weights(reading, index):
            for name, member in members.items():
                parts[name].append(torch.einsum("bhrs,bs->bhr", weights, member.to(weights)))
        wanted = rows[:, None, index]
        for name, masses in parts.items():
            mass = torch.cat(masses, 2)
            if self.reduce == "max":
                value = mass.masked_fill(~wanted, -torch.inf).amax(2)
                value = value.masked_fill(torch.isneginf(value), torch.nan)
            else:
                value = (mass * wanted).sum(2) / wanted.sum(2)
            self.found[name][call.tower, call.layer] = value


def _weights(reading: Reading, index: Int[Tensor, " r"]) -> Iterator[Float[Tensor, "b h r s"]]:
    """Whole rows of final weights, in order, a few at a time."""
    call = reading.call
    if not reading.edited and len(index) <= FEW:
        lse = call.lse[:, :, index]
        yield (call.scores(index) - lse.masked_fill(torch.isneginf(lse), 0)[..., None]).exp()
        return
    for block in reading.blocks(trim=False):
        at = torch.arange(call.q.shape[2], device=index.device)[block.index]
        inside = torch.isin(at, index)
        if bool(inside.any()):
            yield block.weights[:, :, inside]


def _shape(given: Mapping[str, Any]) -> tuple[int, int]:
    found = next((given[name] for name in ("input_ids", "inputs_embeds") if name in given), None)
    if not isinstance(found, Tensor):
        raise ValueError(f"group_mass: inputs hold {', '.join(given)}; give token ids as input_ids")
    return int(found.shape[0]), int(found.shape[1])


def _as_group(name: str, group: KeyGroup | Tensor, shape: tuple[int, int]) -> KeyGroup:
    if isinstance(group, KeyGroup):
        return group
    if not isinstance(group, Tensor) or group.dtype != torch.bool or tuple(group.shape) != shape:
        came = f"{group.dtype} of shape {tuple(group.shape)}" if isinstance(group, Tensor) else type(group).__name__
        raise ValueError(f"group_mass: group {name!r} is {came}; give a KeyGroup, or a boolean mask of shape {shape}")
    return positions(group)


def _as_rows(rows: Rows, shape: tuple[int, int]) -> Bool[Tensor, "b t"]:
    b, t = shape
    if isinstance(rows, Tensor) and rows.dtype == torch.bool:
        if tuple(rows.shape) != shape:
            raise ValueError(f"group_mass: rows is a mask of shape {tuple(rows.shape)}; expected {shape}")
        return rows
    index = torch.as_tensor(rows)
    index = index.expand(b) if index.ndim == 0 else index
    if tuple(index.shape) != (b,):
        raise ValueError(f"group_mass: rows has shape {tuple(index.shape)}; give one row, or one for each of {b} texts")
    if bool(((index < -t) | (index >= t)).any()):
        worst = int(index[(index < -t) | (index >= t)][0])
        raise ValueError(f"group_mass: row {worst} is out of range; there are {t} rows (0 to {t - 1})")
    return torch.nn.functional.one_hot((index % t).cpu(), t).bool()
