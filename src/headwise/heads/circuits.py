"""Circuits: the heads of a task stage by stage, how much of the behaviour they carry alone, and what two tasks share.

Paper: headwise/papers/circuit_component_reuse.py (Merullo et al., ICLR 2024).
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import headwise
from headwise._files import read_json, write_text
from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.heads._patch_runs import Inputs, Prompts, Runs
from headwise.heads.effects import MLP, Metric, Node, parse_nodes

__all__ = ["Circuit", "Faithfulness", "Overlap", "faithfulness", "overlap"]

SCHEMA = 1


@dataclass(frozen=True)
class Circuit:
    """The nodes of a task: stage -> nodes, heads ("9.6") and MLPs ("mlp:3"), from the output back to the input.

    model, task: names. about: how it was found.
    """

    stages: Mapping[str, Sequence[Node]]
    model: str = ""
    task: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read = {
            stage: [
                node if isinstance(node, Head) or MLP.fullmatch(node) else Head.parse(node)
                for node in ([nodes] if isinstance(nodes, str | Head) else nodes)
            ]
            for stage, nodes in self.stages.items()
        }
        for stage, nodes in read.items():
            if len(set(nodes)) < len(nodes):
                raise ValueError(f"Circuit: stage {stage!r} names a node twice; give every node once")
        object.__setattr__(self, "stages", read)

    @property
    def nodes(self) -> list[Node]:
        """Every node once, in the order of the stages."""
        return list(dict.fromkeys(node for nodes in self.stages.values() for node in nodes))

    @property
    def heads(self) -> list[Head]:
        """The heads among the nodes."""
        return [node for node in self.nodes if isinstance(node, Head)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit as JSON."""
        document = {
            "headwise": headwise.__version__,
            "schema": SCHEMA,
            "kind": "circuit",
            "model": self.model,
            "task": self.task,
            "about": dict(self.about),
            "stages": {stage: [str(node) for node in nodes] for stage, nodes in self.stages.items()},
        }
        write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read what `save` wrote. Raises InputError for a missing file and for one of another kind."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("kind") != "circuit":
            raise InputError(f"{os.fspath(path)}: holds no circuit; give a file that Circuit.save wrote")
        if document.get("schema") != SCHEMA:
            raise InputError(f"{os.fspath(path)}: has schema {document.get('schema')!r}; this headwise reads {SCHEMA}")
        try:
            return cls(document["stages"], document["model"], document["task"], document["about"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{os.fspath(path)}: is damaged ({error}); find the circuit again") from None


@dataclass(frozen=True)
class Faithfulness:
    """Mean metric of the whole model, of the circuit alone, and with the circuit's heads gone as well."""

    full: float
    circuit: float
    empty: float

    @property
    def share(self) -> float:
        """What the circuit alone keeps of the whole model's metric; nan where that is 0."""
        return self.circuit / self.full if self.full else math.nan

    @property
    def recovered(self) -> float:
        """The same counted from the empty circuit: 0 is as bad as without it, 1 as good as all of the model."""
        return (self.circuit - self.empty) / (self.full - self.empty) if self.full != self.empty else math.nan


def faithfulness(
    model: nn.Module,
    circuit: Circuit | Iterable[Node],
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    mode: Literal["resample", "mean"] = "resample",
    mlps: bool = False,
    position_of_metric: int = -1,
    batch_tokens: int = 16384,
) -> Faithfulness:
    """The metric when everything outside the circuit puts out what it does on other prompts, at every position.

    mode: "resample" takes the corrupt prompt of the same row, "mean" the mean over all corrupt prompts, position by
    position. mlps: MLPs outside the circuit are replaced as well; otherwise all MLPs stay and respond.
    Other arguments and errors as in `activation_patch`.
    """
    where = "faithfulness"
    if mode not in ("resample", "mean"):
        raise ValueError(f"{where}: mode is {mode!r}; choose resample or mean")
    prompts = Prompts.of(where, model, clean, corrupt)
    runs = Runs(where, model, prompts, position=None, at=position_of_metric, batch_tokens=batch_tokens)
    kept_heads, kept_mlps = parse_nodes(where, circuit.nodes if isinstance(circuit, Circuit) else circuit, runs.layout)
    fed = runs.feeding if mlps else []
    outside = [head for head in runs.layout.heads() if head not in kept_heads]
    groups = [
        ((), ()),
        (outside, [layer for layer in fed if layer not in kept_mlps]),
        (runs.layout.heads(), fed),
    ]
    with runs:
        values = runs.corrupt.mean() if mode == "mean" else None
        found = torch.cat([metric(logits) for _, logits, _ in runs.run(groups, values)]).double().mean(-1)
    full, alone, empty = found.tolist()
    return Faithfulness(full, alone, empty)


@dataclass(frozen=True)
class Overlap:
    """How many heads two sets share, beside what chance gives.

    size: heads of each set. share: shared heads as a share of the smaller set. expected: shared heads of random sets of
    these sizes. p: chance of sharing at least as many.
    """

    shared: tuple[Head, ...]
    size: tuple[int, int]
    share: float
    expected: float
    p: float

    def __str__(self) -> str:
        return (
            f"{len(self.shared)} of {min(self.size)} heads shared ({self.share:.0%}; {self.expected:.2f} expected by "
            f"chance, p = {self.p:.2g})"
        )


def overlap(
    a: HeadMap | Circuit | Iterable[Head | str],
    b: HeadMap | Circuit | Iterable[Head | str],
    *,
    k: int | None = None,
    top: float = 0.02,
    layout: Layout | None = None,
    null: Literal["any", "layer"] = "any",
    among: Iterable[Head | str] | None = None,
) -> Overlap:
    """Heads that two sets share, with the exact chance of sharing so many.

    a, b: sets of heads, circuits, or head maps, of which the k strongest heads are taken, by size whatever the sign (k
    None: the share `top` of all heads, rounded up; the paper takes 2 % a stage). layout: where sets are drawn from; a
    head map's own where there is one.
    null: "any" draws from all heads (hypergeometric), "layer" as many heads of every layer as each set has there (a
    convolution of hypergeometric laws), which does not count it as overlap that two sets lie in the same layers.
    among: the only heads that sets are drawn from, such as those that are alive; both sets must lie among them.

    Raises ValueError for an empty set, a head given twice, and where no layout is known.
    """
    where = "overlap"
    if null not in ("any", "layer"):
        raise ValueError(f"{where}: null is {null!r}; choose any or layer")
    for given in (a, b):
        layout = given.layout if layout is None and isinstance(given, HeadMap) else layout
    if layout is None:
        raise ValueError(f"{where}: layout is missing; give it (headwise.hf.layout), or two head maps")
    pool = layout.heads() if among is None else parse_nodes(where, among, layout)[0]
    if k is None:
        k = math.ceil(top * len(pool))
    if not 1 <= k <= len(pool):
        raise ValueError(f"{where}: k is {k}; expected 1 to {len(pool)} heads")
    one, other = (_set(where, given, k, layout, pool) for given in (a, b))
    law = [1.0]
    towers = [None] if null == "any" else range(layout.main.layers)
    for layer in towers:
        inside = [[h for h in heads if layer in (None, h.layer)] for heads in (pool, one, other)]
        law = _convolved(law, _hypergeometric(*(len(heads) for heads in inside)))
    shared = tuple(head for head in one if head in set(other))
    expected = math.fsum(count * chance for count, chance in enumerate(law))
    return Overlap(
        shared,
        (len(one), len(other)),
        len(shared) / min(len(one), len(other)),
        expected,
        min(1.0, math.fsum(law[len(shared) :])),
    )


def _set(where: str, given: Any, k: int, layout: Layout, pool: list[Head]) -> list[Head]:
    if isinstance(given, HeadMap):
        table, known = given.of(), set(pool)
        scored = [(-abs(score), head) for head, score in table.items() if score is not None and head in known]
        return [head for _, head in sorted(scored)[:k]]
    heads = given.heads if isinstance(given, Circuit) else parse_nodes(where, given, layout)[0]
    if not heads:
        raise ValueError(f"{where}: a set holds no head; give at least one")
    if outside := [head for head in heads if head not in set(pool)]:
        raise ValueError(f"{where}: head {outside[0]} is none of the {len(pool)} that sets are drawn from")
    return list(heads)


def _hypergeometric(total: int, first: int, second: int) -> list[float]:
    """Chance of sharing 0, 1, ... when `second` of `total` are drawn and `first` are marked."""
    ways = math.comb(total, second)
    return [
        math.comb(first, n) * math.comb(total - first, second - n) / ways if second - n <= total - first else 0.0
        for n in range(min(first, second) + 1)
    ]


def _convolved(a: list[float], b: list[float]) -> list[float]:
    found: Counter[int] = Counter()
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y  # pyright: ignore[reportArgumentType]
    return [float(found[n]) for n in range(len(a) + len(b) - 1)]
