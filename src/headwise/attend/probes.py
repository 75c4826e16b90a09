"""The probes: what each attention head does, as one number a head.

A[t, j] is the weight of row t on key j. Scores are means over the rows of all texts, without the first row of each
text and without padding; nan where no row qualifies.
"""

import difflib

import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.call import Call
from headwise.attend.read import Probe, Reading, RowBlock
from headwise.ops.masks import visible

__all__ = [
    "PROBES",
    "Contribution",
    "Distance",
    "Dormant",
    "Duplicate",
    "Entropy",
    "EntropyNats",
    "HeadOutputs",
    "Induction",
    "OutputNorm",
    "Previous",
    "Sink",
    "Sinks",
    "ValueWeightedSink",
    "make_probe",
]


class Sink(Probe):
    """Mean A[t, first real token]."""

    name = "sink"
    sentence = "How much of its attention the head parks on the first token."

    def sparse(self, reading: Reading) -> None:
        mass = _sink_mass(reading)
        self.add(reading, (mass * reading.valid[:, None]).sum((0, 2)), reading.rows.sum())


class Dormant(Probe):
    """Share of rows with A[t, first real token] > 0.5."""

    name = "dormant"
    sentence = "How often the head is switched off: the share of tokens at which more than half of it sits on the sink."

    def sparse(self, reading: Reading) -> None:
        parked = (_sink_mass(reading) > 0.5) & reading.valid[:, None]
        self.add(reading, parked.double().sum((0, 2)), reading.rows.sum())


class Previous(Probe):
    """Mean A[t, t-1]."""

    name = "previous"
    sentence = "How much the head attends to the token just before."

    def sparse(self, reading: Reading) -> None:
        weights, real = reading.diagonal(1)
        rows = real & reading.valid
        self.add(reading, (weights * rows[:, None]).sum((0, 2)), rows.sum())


class Duplicate(Probe):
    """Over rows with an earlier equal token: mean mass on all j < t with x_j = x_t."""

    name = "duplicate"
    sentence = "How much the head attends to earlier copies of the current token."
    causal_only = True
    ahead = 0

    def block(self, reading: Reading, block: RowBlock) -> None:
        def mass() -> Tensor:
            b, r, s, _ = _copies(reading, block)
            return block.weights[b, :, r, s + self.ahead].sum(0, dtype=torch.float64)[:, None]

        reading.keep(self.name, block, mass)
        reading.keep("rows with copies", block, lambda: _copies(reading, block)[3])

    def finish(self, reading: Reading) -> None:
        self.add(reading, reading.kept(self.name).sum(-1), reading.kept("rows with copies").sum())


class Induction(Duplicate):
    """Over rows with an earlier equal token: mean mass on j <= t with x_(j-1) = x_t and j - 1 < t."""

    name = "induction"
    sentence = "How much the head attends to what followed earlier copies of the current token, ready to repeat it."
    ahead = 1


class EntropyNats(Probe):
    """Mean entropy of a row in nats; with learned sinks, of the renormalised row."""

    name = "entropy-nats"
    sentence = "How widely the head spreads its attention, in nats."

    def block(self, reading: Reading, block: RowBlock) -> None:
        reading.keep("entropy", block, lambda: _entropy(reading, block))

    def finish(self, reading: Reading) -> None:
        rows = reading.valid[:, reading.index]
        self.add(reading, (reading.kept("entropy") * rows[:, None]).sum((0, 2)), rows.sum())


class Entropy(EntropyNats):
    """Mean H(A[t]) / log(number of visible keys): 0 is one key, 1 is all keys alike."""

    name = "entropy"
    sentence = "How widely the head spreads its attention: 0 is a single token, 1 is everything evenly."

    def finish(self, reading: Reading) -> None:
        seen = _visible_counts(reading.call)[:, reading.index]
        rows = reading.valid[:, reading.index] & (seen > 1)
        entropy = reading.kept("entropy")
        share = entropy / seen.clamp_min(2).to(entropy).log()[:, None]
        self.add(reading, (share * rows[:, None]).sum((0, 2)), rows.sum())


class Distance(Probe):
    """Mean of sum_j A[t, j] (t - j), in tokens."""

    name = "distance"
    sentence = "How far back the head looks on average, in tokens."
    causal_only = True

    def block(self, reading: Reading, block: RowBlock) -> None:
        def distance() -> Tensor:
            # Measured from the block's first row, so that short distances keep their digits late in a long text.
            weights, ahead = block.weights, block.positions - block.positions[0]
            column = torch.arange(weights.shape[-1], device=weights.device) + reading.call.key_offset
            back = (block.positions[0] - column).to(weights.dtype)
            return weights @ back + weights.sum(-1) * ahead

        reading.keep("distance", block, distance)

    def finish(self, reading: Reading) -> None:
        rows = reading.valid[:, reading.index]
        self.add(reading, (self.scaled(reading) * rows[:, None]).sum((0, 2)), rows.sum())

    def scaled(self, reading: Reading) -> Tensor:
        """`[b h n]` the distance of every row that was read."""
        return reading.kept("distance")


class DistanceShare(Distance):
    """Mean of sum_j A[t, j] (t - j) / t: 0 is the token itself, 1 is the first token."""

    name = "distance-share"
    sentence = "How far back the head looks, as a share of the text before the token."

    def scaled(self, reading: Reading) -> Tensor:
        # t counts from the first real token, so that padding does not make a text longer
        before = (reading.positions - reading.first_row[:, None]).clamp_min(1)
        return super().scaled(reading) / before[:, None, reading.index]


class Sinks(Probe):
    """Mass on the columns whose mean received attention exceeds max(0.1, 20 / t) for any head of the layer."""

    name = "sinks"
    sentence = "How much attention goes to the sink tokens of the layer, wherever in the text they are."

    def block(self, reading: Reading, block: RowBlock) -> None:
        _column_sums(reading, block)

    def finish(self, reading: Reading) -> None:
        sums, sinks = _found_sinks(reading)
        self.add(reading, (sums * sinks[:, None]).sum((0, 2)), reading.valid[:, reading.index].sum())


class ValueWeightedSink(Probe):
    """Sum over sink columns of A |v| divided by the sum over all columns of A |v|."""

    name = "value-weighted-sink"
    sentence = "How much of what the head actually moves comes from sink tokens; small where sinks carry no value."

    def block(self, reading: Reading, block: RowBlock) -> None:
        _column_sums(reading, block)

    def finish(self, reading: Reading) -> None:
        sums, sinks = _found_sinks(reading)
        call = reading.call
        norms = call.v.to(call.work_dtype).norm(dim=-1).double().repeat_interleave(call.groups, 1)
        moved = sums * norms
        self.add(reading, (moved * sinks[:, None]).sum((0, 2)), moved.sum((0, 2)))


class OutputNorm(Probe):
    """Mean norm of the head's output z (gated, in families with a gate after attention)."""

    name = "output-norm"
    sentence = "How large the head's output is before heads are mixed."

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        norms = heads.to(reading.call.work_dtype).norm(dim=-1).double() * reading.valid[..., None]
        self.add(reading, norms.sum((0, 1)), reading.rows.sum())


class Contribution(Probe):
    """Mean of |W_O^h z_h| / |attention output|."""

    name = "contribution"
    sentence = "How large the head's share is in what its layer writes."

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        dtype = reading.call.work_dtype
        weight = reading.state["projection"].to(heads.dtype).to(dtype)  # h e c
        # |W z|^2 = z^T (W W^T) z: one small matrix a head instead of a vector of the model's width for each.
        z = heads.to(dtype).transpose(1, 2)  # b h t e
        own = (z @ (weight @ weight.mT)).mul_(z).sum(-1).clamp_min(0).sqrt()
        size = mixed.to(dtype).norm(dim=-1).clamp_min(torch.finfo(dtype).tiny)
        share = own / size[:, None] * reading.valid[:, None]
        self.add(reading, share.sum((0, 2)), reading.rows.sum())


class HeadOutputs(Probe):
    """Keeps the outputs of heads, for mean and resample ablation."""

    name = "head-outputs"
    kind = "store"

    def __init__(self, **options):
        super().__init__(**options)
        self.values: dict[tuple[str, int], Tensor] = {}

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        place = (reading.call.tower, reading.call.layer)
        self.values[place] = heads if place not in self.values else torch.cat([self.values[place], heads], 1)
        rows = reading.call.real_rows[..., None, None]
        total = (heads.double() * rows).sum((0, 1))
        self.sums[place] = self.sums[place] + total if place in self.sums else total
        count = rows.sum().double()
        self.counts[place] = self.counts[place] + count if place in self.counts else count

    def mean(self) -> dict[Head, Tensor]:
        """The mean output of every head over the real tokens read so far, `[e]`."""
        return {
            Head(layer, h, tower): self.sums[tower, layer][h].div(self.counts[tower, layer]).float()
            for tower, layer in self.sums
            for h in range(self.sums[tower, layer].shape[0])
        }

    def resample(self) -> dict[Head, Tensor]:
        """The outputs of every head in the last run, `[b, t, e]`."""
        return {
            Head(layer, h, tower): value[:, :, h]
            for (tower, layer), value in self.values.items()
            for h in range(value.shape[2])
        }


def _sink_mass(reading: Reading) -> Tensor:
    """`[b h t]` weight on the first real token, computed once for all probes of a call."""
    if "sink mass" not in reading.state:
        reading.state["sink mass"] = reading.mass(reading.first_column[:, None])
    return reading.state["sink mass"]


def _copies(reading: Reading, block: RowBlock) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of a row of a block and an earlier equal token: texts, rows, columns, and `[1]` the number of such rows.

    Equal tokens are few, so weights are gathered pair by pair; the pairs are found once per forward.
    """
    call = reading.call
    key = ("copies", isinstance(block.index, slice), block.start, tuple(block.weights.shape[2:]), call.key_offset)

    def find():
        ids = reading.row_ids()[:, block.index]
        ids = ids.masked_fill(~block.valid | (ids < 0), -2)
        columns = reading.column_ids().masked_fill(~call.real_columns, -3)[:, : block.weights.shape[-1]]
        b, r, s = (columns[:, None] == ids[..., None]).nonzero(as_tuple=True)
        earlier = s + call.key_offset < block.positions[r]
        b, r, s = b[earlier], r[earlier], s[earlier]
        return b, r, s, torch.tensor([torch.unique_consecutive(b * ids.shape[1] + r).numel()], device=ids.device)

    return call.step.once(key, find) if call.step is call.key_step else find()


def _entropy(reading: Reading, block: RowBlock) -> Tensor:
    """`[b h r]` entropy of renormalised rows in nats."""
    if block.logs is None:
        entropy = torch.special.entr(block.weights).sum(-1)
    else:
        entropy = -torch.linalg.vecdot(block.weights, block.logs)
    if reading.call.sinks is None and not reading.edited:
        return entropy
    total = block.weights.sum(-1)  # 0 where a row gives all to a learned sink
    empty = total <= 0
    total = total.masked_fill(empty, 1)
    return (entropy / total + total.log()).masked_fill(empty, 0)


def _visible_counts(call: Call) -> Tensor:
    """`[b t]` how many keys each row may see (of its first head, where a bias hides keys by head)."""
    t, s = call.q.shape[2], call.k.shape[2]
    mask = None if call.mask is None else call.mask[:, :1]

    def count(rows: slice) -> Tensor:
        seen = visible(mask, call.causal, t, s, call.q.device, rows=rows)
        seen = torch.ones(1, s, dtype=torch.bool, device=call.q.device) if seen is None else seen
        seen = seen[:, 0] if seen.ndim == 4 else seen[None]
        return seen.sum(-1).expand(-1, rows.stop - rows.start)

    def counts() -> Tensor:
        return torch.cat([count(slice(start, min(start + 512, t))) for start in range(0, t, 512)], -1)

    return call.step.once(("visible", id(call.mask), call.causal, t, s), counts)


def _column_sums(reading: Reading, block: RowBlock) -> None:
    """Collect `[b h s]` attention received by every column."""
    state, call = reading.state, reading.call
    if state.get("columns of") is block:
        return
    state["columns of"] = block
    if "columns" not in state:
        state["columns"] = torch.zeros(*call.q.shape[:2], call.k.shape[2], dtype=torch.float64, device=call.q.device)
    sums = block.valid.to(block.weights.dtype)[:, None, None] @ block.weights
    state["columns"][..., : sums.shape[-1]].add_(sums[:, :, 0])


def _found_sinks(reading: Reading) -> tuple[Tensor, Tensor]:
    """Column sums `[b h s]` and which columns are sinks `[b s]`, computed once for all probes of a call."""
    sums, call = reading.state["columns"], reading.call
    if "sinks" not in reading.state:
        rows = torch.zeros(call.q.shape[0], call.step.total, dtype=torch.float64, device=sums.device)
        rows[:, reading.positions[reading.index]] = reading.valid[:, reading.index].double()
        seen_by = rows.sum(-1, keepdim=True)
        if call.kind == "causal":  # the mean is over the rows that can see a column: its own and later ones
            column = torch.arange(sums.shape[-1], device=sums.device) + call.key_offset
            later = rows.flip(-1).cumsum(-1).flip(-1)
            seen_by = torch.nn.functional.pad(later, (0, 1))[:, column.clamp_max(rows.shape[1])]
        received = sums / seen_by.clamp_min(1)[:, None]
        reading.state["sinks"] = (received > max(0.1, 20 / rows.shape[1])).any(1) & call.real_columns
    return sums, reading.state["sinks"]


PROBES: dict[str, type[Probe]] = {
    probe.name: probe
    for probe in (
        Sink,
        Sinks,
        Previous,
        Duplicate,
        Induction,
        Entropy,
        EntropyNats,
        Distance,
        DistanceShare,
        Contribution,
        OutputNorm,
        ValueWeightedSink,
        Dormant,
    )
}


def make_probe(name: str, **options) -> Probe:
    """Make a probe by name. Raises ValueError with the nearest name."""
    if name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(PROBES)}"
        raise ValueError(f"probe {name!r} is unknown; {hint}")
    return PROBES[name](**options)
