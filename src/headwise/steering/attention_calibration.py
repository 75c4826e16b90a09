"""ACT: damp the sinks behind the first token in chosen heads and give what they lose to the other keys, per input.

    s_k = sum_q A[q, k] / (N - k)                      k is a sink where s_k > threshold and k is not the first token
    A'[q, k] = beta A[q, k]                            for sinks
    A'[q, k] = A[q, k] (1 + W_q / R_q)                 for the others, the first token among them

W_q = (1 - beta) times the weight of row q on sinks, R_q its weight on the others: rows sum to what they summed to. It
is the same as adding log beta to the scores of sinks and log(1 + W_q / R_q) to those of the others. What columns have
received is kept with the cache, so that a generated token is judged by all rows before it and its own.

Paper: headwise/papers/attention_calibration.py (Yu et al., ICML 2024).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.edit import ColumnEdit, Rows
from headwise.attend.edits import ScaleGroup
from headwise.attend.groups import first_token, over_columns
from headwise.attend.machine import ROWS_PER_BLOCK, over_values, rows_and_sink
from headwise.attend.merge import merge_sets
from headwise.attend.received import ColumnMemory, Received, column_sums, rows_that_see, sink_limit
from headwise.attend.step import Step

__all__ = ["AttentionCalibration", "calibrate_sinks", "calibration_bias"]

FIRST = first_token()


def calibration_bias(
    weights: Float[Tensor, "*b s"], sinks: Bool[Tensor, "*#b s"], beta: float = 0.4
) -> Float[Tensor, "*b s"]:
    """What is added to the scores: log beta at sinks, log(1 + W / R) at the others of a row.

    0 in rows without weight on sinks, and in rows with weight on nothing else. In float32, float64 for float64 weights.

    >>> calibration_bias(torch.tensor([0.5, 0.5]), torch.tensor([False, True]), 0.4).exp().tolist()
    [1.600000023841858, 0.4000000059604645]
    """
    _check_beta("calibration_bias", beta)
    _, factor, grown = _factors(weights, sinks, beta)
    return torch.where(sinks, factor, grown).log()


def calibrate_sinks(
    weights: Float[Tensor, "*b s"], sinks: Bool[Tensor, "*#b s"], beta: float = 0.4
) -> Float[Tensor, "*b s"]:
    """The edit on weights that were formed: sinks times beta, the others scaled up in proportion.

    sinks: which keys; they broadcast over rows (`[b h 1 s]`) or differ from row to row. Rows keep their sum, keys of
    weight 0 keep it, and rows with weight on sinks alone stay as they are.
    Raises ValueError for a beta outside 0 to 1.

    >>> calibrate_sinks(torch.tensor([0.6, 0.3, 0.1]), torch.tensor([False, True, False]), 0.0).tolist()
    [0.8571429252624512, 0.0, 0.1428571492433548]
    """
    _check_beta("calibrate_sinks", beta)
    work, factor, grown = _factors(weights, sinks, beta)
    return (work * torch.where(sinks, factor, grown)).to(weights.dtype)


def _factors(weights: Tensor, sinks: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in float32 or float64; the factors of sinks and of the others in every row, both 1 where it has no
    others."""
    work = weights if weights.dtype in (torch.float32, torch.float64) else weights.float()
    own = work * sinks
    # Each sum from its own keys, never 1 minus the other: exact also where sinks take nearly all.
    rest = (work - own).sum(-1, keepdim=True)
    empty = rest <= 0
    grown = own.sum(-1, keepdim=True) * (1 - beta) / rest.masked_fill(empty, torch.inf) + 1
    return work, grown.masked_fill(~empty, beta), grown


@dataclass
class _Columns:
    """The columns of one call while its rows come in. sinks: `[b h 1 s]`, or `[b h t s]` where rows judge alone."""

    memory: ColumnMemory
    received: Received
    eligible: Tensor  # `[b s]` real keys other than the first
    sinks: Tensor | None = None
    whole: bool = False


@dataclass
class AttentionCalibration(ColumnEdit):
    """Multiply the attention to sinks behind the first token by beta and give it to the other keys (ACT).

    beta: 0 to 1; at 1 nothing changes. threshold: mean weight above which a key is a sink, 0 to 1 (None is 0.1); with
        relative, that many times 1 / N instead, N the number of tokens (None is 5).
    statistics: what a row of the prompt is judged by:
        prompt: all rows that came in with it, and those before, as in the paper. Later tokens then reach earlier rows
            through the choice of sinks: do not score a text by the loss of its own tokens under it.
        running: the rows up to itself, so that a text read at once, in chunks or token by token gives the same.
      A generated token is judged by all rows before it and its own either way.

    Sinks are chosen anew for every head and input. The first token is the first real one of each sequence; it is never
    damped, and usually gets most of what the others lose. A row with weight on sinks alone stays as it is. Models that
    are not causal count all rows for every key. Rows that were computed before the edit was opened are not known to it:
    fill the cache inside the block.

    Notes: the paper's text has alpha / N with alpha 5, the authors' code a fixed 0.1 (0.15 for MT-bench), the default
    here. Their code spares the first key above the threshold and takes it for the first token, which is another where
    the first token is no sink; and with a cache it sets the weight of the new row on key 0 to 1 on top of the others.
    Neither is followed. The paper leaves out the first two layers and the last ("2-30.*" of 32).

    >>> AttentionCalibration(heads="2.*", beta=1.0).neutral
    True
    """

    beta: float = 0.4
    threshold: float | None = None
    relative: bool = False
    statistics: Literal["prompt", "running"] = "prompt"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_beta("AttentionCalibration", self.beta)
        if self.statistics not in ("prompt", "running"):
            raise ValueError(f"AttentionCalibration: statistics is {self.statistics!r}; choose prompt or running")
        self.limit = sink_limit("AttentionCalibration", self.threshold, self.relative)
        self._mass = ScaleGroup(FIRST, self.beta)  # its arithmetic, of other keys

    @staticmethod
    def example() -> "AttentionCalibration":
        return AttentionCalibration(heads=["0.1", "1.2"], beta=0.0, threshold=0.05, statistics="running")

    @property
    def neutral(self) -> bool:
        return self.beta == 1

    def rows(self, call: Call) -> Literal[True] | Literal[False] | Tensor:
        touched = super().rows(call)
        if touched is False:  # rows that are not changed count all the same
            return torch.zeros(call.q.shape[0], call.q.shape[2], dtype=torch.bool, device=call.q.device)
        return touched

    # How a call is judged

    def shown(self, call: Call) -> bool:
        found = call.memo.get(("received", self.serial))
        return found is not None and found.whole

    def begin(self, call: Call) -> None:
        place = ("received", self.serial, call.tower, call.layer)
        memory = call.step.carried.setdefault(place, ColumnMemory())
        before = memory.before(call)
        if call.mask is not None and call.mask.shape[1] > 1:  # heads see different keys
            before.counts = before.counts.expand_as(before.sums).clone()
        eligible = call.key_step.once(("behind the first", call.k.shape), lambda: _behind_the_first(call))
        call.memo["received", self.serial] = _Columns(memory, before, eligible)

    def show(self, weights: Tensor, rows: Rows) -> None:
        columns = _columns_of(self, rows.call)
        judged = self._judge(weights, rows)
        if judged is None:
            return
        if columns.sinks is None:
            b, h, t = rows.call.q.shape[:3]
            columns.sinks = torch.zeros(b, h, t, rows.call.k.shape[2], dtype=torch.bool, device=weights.device)
        columns.sinks[:, :, rows.index, : weights.shape[-1]] = judged

    def end(self, call: Call) -> None:
        columns = _columns_of(self, call)
        if self._at_once(call):
            received, step = columns.received, call.key_step
            if step.all_real and call.mask is None and not call.causal:  # all rows see all columns
                received.counts += call.q.shape[2]
            else:
                received.counts += rows_that_see(call)
            limit = step.once(("limit", self.serial), lambda: self._limit(_tokens(step)))
            columns.sinks = ((received.mean > limit) & columns.eligible[:, None])[:, :, None]
        columns.memory.keep(call, columns.received)
        columns.whole = columns.sinks is not None

    def _judge(self, weights: Tensor, rows: Rows) -> Tensor | None:
        """Count rows; where they are judged by themselves, their sinks `[b h r s]`."""
        weights = weights.detach()
        call, n = rows.call, weights.shape[-1]
        received = _columns_of(self, call).received
        if self._at_once(call):
            if weights.shape[2] == 1 and call.every_row_real:
                own = weights[:, :, 0]
            else:
                own = (call.real_rows[:, None, None, rows.index].to(weights.dtype) @ weights)[:, :, 0]
            sums = received.sums if n == received.sums.shape[-1] else received.sums[..., :n]
            sums += own
            return None
        real = call.real_rows[:, rows.index]
        eligible = _columns_of(self, call).eligible[:, :n]
        real = real[:, None, :, None]
        sums = received.sums[:, :, None, :n] + (weights * real).cumsum(2)
        counts = received.counts[:, :, None, :n] + (rows.visible & real).cumsum(2)
        received.sums[..., :n], received.counts[..., :n] = sums[:, :, -1], counts[:, :, -1]
        limit = self._limit(_tokens_so_far(call)[:, rows.index])
        if isinstance(limit, Tensor):
            limit = limit[:, None, :, None]
        return (sums / counts.clamp_min(1) > limit) & eligible[:, None, None]

    def _at_once(self, call: Call) -> bool:
        """Whether the rows of a call are judged together, after all of them were counted."""
        return self.statistics == "prompt" or call.q.shape[2] == 1

    def _limit(self, tokens: Tensor | int) -> float | Tensor:
        if not self.relative:
            return self.limit
        return self.limit / (tokens.clamp_min(1) if isinstance(tokens, Tensor) else max(1, tokens))

    # What becomes of it

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        sinks = _columns_of(self, rows.call).sinks
        assert sinks is not None  # all rows were shown
        sinks = sinks if sinks.shape[2] == 1 else sinks[:, :, rows.index]
        return self._changed(weights, sinks[..., : weights.shape[-1]], rows)

    def _changed(self, weights: Tensor, sinks: Tensor, rows: Rows) -> Tensor:
        if rows.sink is None:
            return calibrate_sinks(weights, sinks, self.beta)
        # A learned sink column is a key that carries no value: it gets its part like the others.
        wide = calibrate_sinks(torch.cat([weights, rows.sink], -1), torch.nn.functional.pad(sinks, (0, 1)), self.beta)
        rows.sink = wide[..., -1:]
        return wide[..., :-1]

    def fused(self, call: Call) -> Tensor | None:
        if self.statistics == "running" or call.q.shape[2] <= ROWS_PER_BLOCK:
            return self._in_one_pass(call)
        self.begin(call)
        columns = _columns_of(self, call)
        with torch.no_grad():
            call.memo["lse"] = call.attend()[1]
            columns.received.sums += column_sums(call)
        self.end(call)
        assert columns.sinks is not None
        return merge_sets(call, columns.sinks[:, :, 0], self._mass)

    def _in_one_pass(self, call: Call) -> Tensor:
        """Rows block by block, each changed as soon as it was counted; a whole prompt only where it is one block."""
        t = call.q.shape[2]
        self.begin(call)
        outs = []
        for start in range(0, t, ROWS_PER_BLOCK):
            index = slice(start, min(t, start + ROWS_PER_BLOCK))
            columns = index.stop if call.causal else None
            weights, sink = rows_and_sink(call, index, columns)
            rows = Rows(call, index, columns, None, sink)
            sinks = self._judge(weights, rows)
            if sinks is None:
                self.end(call)
                new = self.change(weights, rows)
            else:
                new = self._changed(weights, sinks, rows)
            outs.append(over_values(call, new))
        if not self._at_once(call):
            self.end(call)
        if len(outs) == 1:
            return outs[0]
        return torch.cat(outs, 2) if outs else call.attend()[0]


def _columns_of(edit: AttentionCalibration, call: Call) -> _Columns:
    return call.memo["received", edit.serial]


def _behind_the_first(call: Call) -> Tensor:
    """`[b s]` real keys other than the first of their sequence."""
    if call.key_step.batch != call.k.shape[0]:
        return call.real_columns
    others, _ = over_columns(call, "others", (FIRST,), _outside)
    same = call.key_step.all_real and call.k.shape[2] <= call.key_step.total  # a longer cache holds nothing there
    return others if same else call.real_columns & others


def _outside(members: Tensor) -> tuple[Tensor, None]:
    return ~members[0], None


def _tokens(step: Step) -> Tensor | int:
    """How many real tokens there are, `[b 1 1]` or in every sequence."""
    return step.total if step.all_real else step.real.sum(-1)[:, None, None]


def _tokens_so_far(call: Call) -> Tensor:
    """`[b t]` how many real tokens there are up to each row; all of them where rows see what follows."""
    real: Tensor = call.key_step.real
    t = call.q.shape[2]
    if call.kind != "causal" or call.step is not call.key_step or real.shape[0] != call.q.shape[0]:
        return real.sum(-1, keepdim=True).expand(call.q.shape[0], t)
    step: Step = call.step
    return step.real.cumsum(-1)[:, call.row_offset : call.row_offset + t]


def _check_beta(where: str, beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{where}: beta is {beta}; it must lie between 0 (sinks get nothing) and 1 (nothing changes)")
