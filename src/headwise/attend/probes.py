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

    def block(self, reading: Reading, block: RowBlock) -> None:
        self.add(reading, *_matched(reading, block, ahead=0))


class Induction(Probe):
    """Over rows with an earlier equal token: mean mass on j <= t with x_(j-1) = x_t and j - 1 < t."""

    name = "induction"
    sentence = "How much the head attends to what followed earlier copies of the current token, ready to repeat it."
    causal_only = True

    def block(self, reading: Reading, block: RowBlock) -> None:
        self.add(reading, *_matched(reading, block, ahead=1))


class EntropyNats(Probe):
    """Mean entropy of a row in nats; with learned sinks, of the renormalised row."""

    name = "entropy-nats"
    sentence = "How widely the head spreads its attention, in nats."

    def block(self, reading: Reading, block: RowBlock) -> None:
        entropy = _row_entropy(reading, block)
        self.add(reading, (entropy * block.valid[:, None]).sum((0, 2)), block.valid.sum())


class Entropy(Probe):
    """Mean H(A[t]) / log(number of visible keys): 0 is one key, 1 is all keys alike."""

    name = "entropy"
    sentence = "How widely the head spreads its attention: 0 is a single token, 1 is everything evenly."

    def block(self, reading: Reading, block: RowBlock) -> None:
        seen = _visible_counts(reading, block)
        share = _row_entropy(reading, block) / seen.clamp_min(2).log()[:, None]
        rows = block.valid & (seen > 1)
        self.add(reading, (share * rows[:, None]).sum((0, 2)), rows.sum())


class Distance(Probe):
    """Mean of sum_j A[t, j] (t - j), in tokens."""

    name = "distance"
    sentence = "How far back the head looks on average, in tokens."
    causal_only = True
    share = False

    def block(self, reading: Reading, block: RowBlock) -> None:
        call = reading.call
        columns = torch.arange(block.weights.shape[-1], device=block.weights.device) + call.key_offset
        # sum_j A (t - j) = t sum_j A - sum_j A j: both sums in one product
        both = block.weights @ torch.stack([torch.ones_like(columns), columns], -1).to(block.weights)
        back = block.positions.to(both) * both[..., 0] - both[..., 1]
        if self.share:
            # t counts from the first real token, so that padding does not make a text longer
            back = back / (block.positions - reading._first_row[:, None]).clamp_min(1)[:, None].to(back)
        self.add(reading, (back * block.valid[:, None]).sum((0, 2)), block.valid.sum())


class DistanceShare(Distance):
    """Mean of sum_j A[t, j] (t - j) / t: 0 is the token itself, 1 is the first token."""

    name = "distance-share"
    sentence = "How far back the head looks, as a share of the text before the token."
    share = True


class Sinks(Probe):
    """Mass on the columns whose mean received attention exceeds max(0.1, 20 / t) for any head of the layer."""

    name = "sinks"
    sentence = "How much attention goes to the sink tokens of the layer, wherever in the text they are."

    def block(self, reading: Reading, block: RowBlock) -> None:
        _column_sums(reading, block)

    def finish(self, reading: Reading) -> None:
        sums, sinks = _found_sinks(reading)
        self.add(reading, (sums * sinks[:, None]).sum((0, 2)), reading.state["column rows"].sum())


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
        norms = heads.float().norm(dim=-1).double() * reading.valid[..., None]
        self.add(reading, norms.sum((0, 1)), reading.rows.sum())


class Contribution(Probe):
    """Mean of |W_O^h z_h| / |attention output|."""

    name = "contribution"
    sentence = "How large the head's share is in what its layer writes."

    def output(self, heads: Tensor, mixed: Tensor, reading: Reading) -> None:
        weight = reading.state["projection"].to(heads.dtype)  # h e c
        # |W z|^2 = z^T (W W^T) z: one small matrix a head instead of a vector of the model's width for each.
        gram = torch.einsum("hec,hfc->hef", weight.float(), weight.float())
        z = heads.float()
        own = torch.einsum("bthe,hef,bthf->bth", z, gram, z).clamp_min(0).sqrt()
        size = mixed.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        share = (own / size[..., None]).double() * reading.valid[..., None]
        self.add(reading, share.sum((0, 1)), reading.rows.sum())


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


def _matched(reading: Reading, block: RowBlock, ahead: int) -> tuple[Tensor, Tensor]:
    """Sum over rows with an earlier equal token of the mass `ahead` of its copies, and the number of such rows.

    Equal tokens are few, so the weights are gathered pair by pair; the pairs are found once per forward.
    """
    step, key_step = reading.call.step, reading.call.key_step
    where = block.index.start if isinstance(block.index, slice) else ("sampled", int(block.positions[0]))
    key = ("pairs", ahead, where, tuple(block.weights.shape[2:]), reading.call.key_offset)

    def find():
        ids = reading.row_ids()[:, block.index]
        columns = reading.column_ids()
        s = block.weights.shape[-1]
        position = torch.arange(columns.shape[1], device=ids.device) + reading.call.key_offset
        equal = (columns[:, None, :] == ids[..., None]) & (ids >= 0)[..., None]
        equal &= position < block.positions[:, None]
        equal &= block.valid[..., None] & reading.call.real_columns[:, None]
        rows = equal.any(-1)
        return (*_shifted(equal, ahead)[..., :s].nonzero(as_tuple=True), rows.sum())

    b, r, s, rows = step.once(key, find) if step is key_step else find()
    return block.weights[b, :, r, s].double().sum(0), rows


def _shifted(equal: Tensor, ahead: int) -> Tensor:
    return torch.nn.functional.pad(equal, (ahead, 0))[..., : equal.shape[-1]] if ahead else equal


def _row_entropy(reading: Reading, block: RowBlock) -> Tensor:
    """`[b h r]` entropy of renormalised rows, computed once for all probes of a block."""
    if reading.state.get("entropy of") is not block:
        if block.logs is None:
            entropy = torch.special.entr(block.weights).sum(-1)
        else:
            entropy = -torch.linalg.vecdot(block.weights, block.logs)
        if reading.call.sinks is not None or reading.edited:
            total = block.weights.sum(-1)  # 0 where a row gives all to a learned sink
            empty = total <= 0
            total = total.masked_fill(empty, 1)
            entropy = (entropy / total + total.log()).masked_fill(empty, 0)
        reading.state["entropy of"], reading.state["entropy"] = block, entropy
    return reading.state["entropy"]


def _visible_counts(reading: Reading, block: RowBlock) -> Tensor:
    """`[b r]` how many keys each row may see."""
    call: Call = reading.call

    def count():
        s = block.weights.shape[-1]
        zero = torch.zeros(call.q.shape[0], 1, len(block.positions), s, device=call.q.device)
        return (call.masked(zero, block.index, s) > torch.finfo(torch.float32).min / 2).sum(-1)[:, 0]

    windowed = call.mask is not None and call.mask.shape[1] > 1
    key = ("visible", id(call.mask), call.causal, int(block.positions[0]), tuple(block.weights.shape[2:]))
    return count() if windowed else call.step.once(key, count)


def _column_sums(reading: Reading, block: RowBlock) -> None:
    """Collect `[b h s]` attention received by every column, and `[b total]` which rows were counted."""
    state, call = reading.state, reading.call
    if state.get("columns of") is block:
        return
    sums = torch.einsum("bhrs,br->bhs", block.weights, block.valid.to(block.weights.dtype)).double()
    sums = torch.nn.functional.pad(sums, (0, call.k.shape[2] - sums.shape[-1]))
    rows = torch.zeros(call.q.shape[0], call.row_offset + call.q.shape[2], dtype=torch.float64, device=sums.device)
    rows[:, block.positions] = block.valid.double()
    state["columns"] = state.get("columns", 0) + sums
    state["column rows"] = state.get("column rows", 0) + rows
    state["columns of"] = block


def _found_sinks(reading: Reading) -> tuple[Tensor, Tensor]:
    """Column sums `[b h s]` and which columns are sinks `[b s]`, computed once for all probes of a call."""
    sums, rows = reading.state["columns"], reading.state["column rows"]
    if "sinks" not in reading.state:
        call = reading.call
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
