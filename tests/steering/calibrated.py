"""ACT with a threshold that the tiny model passes, and the same from the definition, row by row in float64."""

from typing import Any

import torch
from torch import Tensor

from headwise.attend.edits import EditRows
from headwise.hf.session import steer
from headwise.steering.attention_calibration import AttentionCalibration

NAMED = ["0.1", "1.2"]
LOOSE = 0.12  # a threshold that some tokens of the tiny model pass, and others do not


def definition(weights: Tensor, last: list[int], *, beta: float, threshold: float, first: int = 0) -> Tensor:
    """Row by row in float64: row q is judged by the rows before `last[q]`, whose texts begin at `first`."""
    a, out = weights.double(), weights.double().clone()
    b, h, t, s = a.shape
    for i in range(b):
        for j in range(h):
            for q in range(first, t):
                sinks = [
                    k
                    for k in range(first + 1, last[q])
                    if float(a[i, j, max(k, first) : last[q], k].sum()) / (last[q] - k) > threshold
                ]
                freed = (1 - beta) * sum(float(a[i, j, q, k]) for k in sinks)
                rest = sum(float(a[i, j, q, k]) for k in range(s) if k not in sinks)
                for k in range(s):
                    out[i, j, q, k] = a[i, j, q, k] * (beta if k in sinks else 1 + freed / rest)
    return out


def by_definition(last: list[int], beta: float = 0.2, threshold: float = LOOSE, heads: Any = None) -> EditRows:
    """The same edit from the definition: a whole text in one forward, its rows judged by what they knew."""
    return EditRows(
        lambda weights, rows: definition(weights, last, beta=beta, threshold=threshold).to(weights),
        heads=NAMED if heads is None else heads,
    )


def act(statistics: Any = "prompt", heads: Any = None, **options: Any) -> AttentionCalibration:
    chosen = {"beta": 0.2, "threshold": LOOSE, **options}
    return AttentionCalibration(heads=NAMED if heads is None else heads, statistics=statistics, **chosen)


def logits(model: Any, *edits: Any, **inputs: Any) -> Tensor:
    with torch.no_grad(), steer(model, *edits):
        return model(**inputs).logits
