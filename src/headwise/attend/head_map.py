"""A table head -> score for one or more probes: what one tool finds about heads and others use.

Saved as JSON (`save`, `load`); CSV and the retrieval-head authors' format are written and read as well.
"""

import csv
import html
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import headwise
from headwise._files import atomic_path, read_json, write_text
from headwise.attend.addresses import Head, Layout, nearest, select_heads
from headwise.errors import InputError

__all__ = ["HeadMap"]

SCHEMA = 1
_PAIR = re.compile(r"([0-9]+)-([0-9]+)")  # "layer-head", as the retrieval-head authors write it


class HeadMap:
    """Scores of every head of a model under one or more probes.

    scores: probe -> head -> score; None or NaN where no row qualified, heads left out count as None.
    source: where the scores come from (a text, a paper's file). runs: per probe one table per run; a probe that
    has runs but no scores gets their mean. A map with one probe needs no probe name anywhere.

    Raises ValueError for a head that the layout has not and for a score that is not a finite number.
    """

    def __init__(
        self,
        scores: Mapping[str, Mapping[Head, float | int | None]],
        layout: Layout,
        *,
        model: str = "",
        source: str = "",
        runs: Mapping[str, Sequence[Mapping[Head, float | int]]] | None = None,
    ) -> None:
        self.layout, self.model, self.source = layout, model, source
        everything = layout.heads("*")
        self.runs: dict[str, list[dict[Head, float]]] = {
            probe: [
                {
                    layout.check(head): value
                    for head, score in run.items()
                    if (value := _finite(probe, head, score)) is not None
                }
                for run in tables
            ]
            for probe, tables in (runs or {}).items()
        }
        self.scores: dict[str, dict[Head, float | None]] = {}
        for probe in [*scores, *(name for name in self.runs if name not in scores)]:
            given = scores[probe] if probe in scores else _means(self.runs[probe])
            table: dict[Head, float | None] = dict.fromkeys(everything)
            table.update((layout.check(head), _finite(probe, head, score)) for head, score in given.items())
            self.scores[probe] = table

    def __repr__(self) -> str:
        towers = ", ".join(f"{t.name + ': ' if t.name else ''}{t.layers} layers" for t in self.layout.towers)
        return f"HeadMap({self.model or 'no model'}; {towers}; {', '.join(self.scores) or 'no probes'})"

    @property
    def probes(self) -> list[str]:
        return list(self.scores)

    def of(self, probe: str | None = None) -> dict[Head, float | None]:
        """The scores of one probe. Raises ValueError for an unknown probe, or when several could be meant."""
        if probe is None:
            if len(self.scores) != 1:
                raise ValueError(f"HeadMap: which probe? it has {', '.join(self.scores) or 'none'}; name one")
            return next(iter(self.scores.values()))
        for name in (probe, probe.replace("_", "-")):
            if name in self.scores:
                return self.scores[name]
        known = ", ".join(self.scores) or "none"
        raise ValueError(f"HeadMap: no probe {probe!r}; it has {known}{nearest(probe, self.scores)}")

    def ranked(self, probe: str | None = None, *, tower: str | None = None) -> list[Head]:
        """Heads that have a score, highest first, ties by address. tower: None is the main one, "*" all."""
        inside, table = set(self.layout.heads(tower)), self.of(probe)
        known = [(-score, head) for head, score in table.items() if score is not None and head in inside]
        return [head for _, head in sorted(known)]

    def top(self, probe: str | None = None, k: int = 10, *, tower: str | None = None) -> list[Head]:
        """The k heads with the highest scores, highest first; fewer when fewer have a score."""
        return self.ranked(probe, tower=tower)[: _positive("top", k)]

    def bottom(self, probe: str | None = None, k: int = 10, *, tower: str | None = None) -> list[Head]:
        """The k heads with the lowest scores, lowest first; fewer when fewer have a score."""
        table, ranked = self.of(probe), self.ranked(probe, tower=tower)
        return sorted(ranked, key=lambda head: (table[head], head))[: _positive("bottom", k)]

    def select(
        self, probe: str | None = None, *, threshold: float | None = None, selection: str | None = None
    ) -> list[Head]:
        """Heads of the main tower with a score of at least `threshold`, highest first; or those of a selection string.

        Exactly one of the two is given. In a selection, probes are this map's.
        """
        if (threshold is None) == (selection is None):
            raise ValueError("HeadMap.select: give either threshold= or selection=, one of them")
        if selection is not None:
            return select_heads(selection, self.layout, scores=self.of)
        table = self.of(probe)
        limit = -math.inf if threshold is None else threshold
        return [head for head in self.ranked(probe) if (score := table[head]) is not None and score >= limit]

    def matched_random(
        self,
        heads: Iterable[Head | str],
        draws: int = 200,
        by: Literal["layer", "any"] = "layer",
        exclude: Iterable[Head | str] = (),
        idle: Iterable[Head | str] | None = None,
        overlap: bool = False,
        seed: int = 0,
    ) -> list[list[Head]]:
        """Control sets for `heads`: each as large, with as many heads in every layer, and none of `heads` in it.

        draws: how many different sets; all there are when there are no more than that. by: "layer" matches tower and
        layer, "any" only the number of heads in each tower. exclude: heads that no set may hold. idle: the only heads a
        set may hold, such as those that a causal trace shows to do nothing. overlap: sets may share heads with `heads`,
        for the null of a search that kept more than half of a layer; never all of them. The same seed gives the same
        sets.

        Raises ValueError when a layer has too few other heads.
        """
        chosen = select_heads(list(heads), self.layout, scores=self.of)
        if not chosen or draws < 1:
            raise ValueError(f"matched_random: {len(chosen)} heads and {draws} draws; expected at least one of each")
        if by not in ("layer", "any"):
            raise ValueError(f"matched_random: by is {by!r}; expected 'layer' or 'any'")
        barred = {*([] if overlap else chosen), *select_heads(list(exclude), self.layout, scores=self.of)}
        allowed = None if idle is None else set(select_heads(list(idle), self.layout, scores=self.of))
        pools: list[tuple[list[Head], int]] = []
        for (tower, layer), count in sorted(
            Counter((h.tower, h.layer if by == "layer" else -1) for h in chosen).items()
        ):
            pool = [
                head
                for head in self.layout.heads(tower)
                if layer in (head.layer, -1) and head not in barred and (allowed is None or head in allowed)
            ]
            if len(pool) < count:
                place = f"layer {layer}" if by == "layer" else "the tower"
                raise ValueError(
                    f"matched_random: {place} has {len(pool)} other heads to draw from but {count} are needed; choose "
                    "fewer heads, exclude fewer, or match by='any'"
                )
            pools.append((pool, count))
        if math.prod(math.comb(len(pool), count) for pool, count in pools) <= draws:
            subsets = itertools.product(*(itertools.combinations(pool, count) for pool, count in pools))
            every = [list(itertools.chain.from_iterable(parts)) for parts in subsets]
            others = [found for found in every if set(found) != set(chosen)]
            if not others:
                raise ValueError("matched_random: the heads fill their layers, no other set exists; choose fewer heads")
            return others
        generator, sets = random.Random(seed), dict[tuple[Head, ...], None]()
        while len(sets) < draws:
            parts = (sorted(generator.sample(pool, count)) for pool, count in pools)
            drawn = tuple(itertools.chain.from_iterable(parts))
            if set(drawn) != set(chosen):
                sets[drawn] = None
        return [list(heads) for heads in sets]

    def activation_frequency(self, probe: str | None = None, above: float = 0.0) -> dict[Head, float]:
        """Share of the runs in which a head's score is greater than `above`, for heads that took part in any run."""
        name = self._name(probe)
        if not self.runs.get(name):
            raise ValueError(f"activation_frequency: the map holds no single runs of {name!r}, only its scores")
        seen: Counter[Head] = Counter()
        active: Counter[Head] = Counter()
        for run in self.runs[name]:
            seen.update(iter(run))  # a mapping would add its scores as counts
            active.update(head for head, score in run.items() if score > above)
        return {head: active[head] / seen[head] for head in self.layout.heads("*") if seen[head]}

    def correlation(self, other: "HeadMap", probe: str | None = None) -> float:
        """Spearman's rank correlation of two maps over heads with a score in both; NaN where one is constant."""
        mine, theirs = self.of(probe), other.of(probe)
        both = [(a, b) for head, a in mine.items() if a is not None and (b := theirs.get(head)) is not None]
        if len(both) < 2:
            raise ValueError(f"correlation: the maps share {len(both)} heads with a score; expected at least 2")
        ranks = [_ranks([pair[side] for pair in both]) for side in (0, 1)]
        middle = (len(both) + 1) / 2
        (xs, ys) = ([rank - middle for rank in side] for side in ranks)
        spread = math.sqrt(sum(x * x for x in xs) * sum(y * y for y in ys))
        return sum(x * y for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan

    def overlap(self, other: "HeadMap", probe: str | None = None, k: int = 10) -> float:
        """Share of this map's k strongest heads that are also among the other map's k strongest."""
        mine, theirs = self.top(probe, k), other.top(probe, k)
        if not mine:
            raise ValueError("overlap: no head of this map has a score")
        return len(set(mine) & set(theirs)) / len(mine)

    def tensor(self, probe: str | None = None, tower: str = "") -> Float[Tensor, "l h"]:
        """The scores of one tower, layers by heads, padded to the widest layer; NaN where there is no score."""
        place = self.layout.tower(tower)
        table = torch.full((place.layers, max(place.heads, default=0)), math.nan, dtype=torch.float64)
        for head, score in self.of(probe).items():
            if head.tower == place.name and score is not None:
                table[head.layer, head.head] = score
        return table

    def to_json(self) -> dict[str, Any]:
        """The document of `headwise scan`: model, towers, and every score under its head's address."""
        main = self.layout.main
        document: dict[str, Any] = {
            "headwise": headwise.__version__,
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "layers": main.layers,
            "heads": max(main.heads, default=0),
            "towers": self.layout.to_json(),
            "probes": {
                name: {str(head): score for head, score in table.items()} for name, table in self.scores.items()
            },
        }
        if self.runs:
            document["runs"] = {
                name: [{str(head): score for head, score in run.items()} for run in tables]
                for name, tables in self.runs.items()
            }
        return document

    @classmethod
    def from_json(cls, document: Any, where: str = "head map") -> "HeadMap":
        """Read what `to_json` wrote. Raises InputError for a document of another kind or of a newer schema."""
        if not isinstance(document, Mapping) or "probes" not in document or "towers" not in document:
            raise InputError(f"{where}: is no head map; expected a heads.json that headwise scan wrote")
        if document.get("schema") != SCHEMA:
            raise InputError(
                f"{where}: has schema {document.get('schema')!r}; this headwise reads schema {SCHEMA}, update headwise"
            )
        try:
            return cls(
                {probe: _parsed(table) for probe, table in document["probes"].items()},
                Layout.from_json(document["towers"]),
                model=str(document.get("model", "")),
                source=str(document.get("source", "")),
                runs={probe: [_parsed(run) for run in tables] for probe, tables in document.get("runs", {}).items()},
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is damaged ({error}); scan the model again") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map as JSON, one probe a line. NaN never occurs in it: a missing score is null."""
        document = self.to_json()
        lines = [f" {_compact(key)}: {_compact(value)}" for key, value in document.items() if key != "probes"]
        probes = ",\n".join(f"  {_compact(name)}: {_compact(table)}" for name, table in document["probes"].items())
        write_text(path, "{\n" + ",\n".join([*lines, f' "probes": {{\n{probes}\n }}']) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadMap":
        """Read a map that `save` wrote. Raises InputError for a missing file and for one of another kind."""
        return cls.from_json(read_json(os.fspath(path)), os.fspath(path))

    @classmethod
    def read(cls, path: str | os.PathLike[str], layout: Layout | None = None) -> "HeadMap":
        """Read either format: headwise's own, or the retrieval-head authors' (laid out as `layout` where given)."""
        document = read_json(os.fspath(path))
        if isinstance(document, dict) and document and all(_PAIR.fullmatch(key) for key in document):
            return cls.from_retrieval_json(document, layout)
        return cls.from_json(document, os.fspath(path))

    @classmethod
    def from_retrieval_json(
        cls, source: str | os.PathLike[str] | Mapping[str, Sequence[float]], layout: Layout | None = None
    ) -> "HeadMap":
        """Read ``{"layer-head": [score of each run]}``, the format in which Wu et al. (2024) published their scores.

        The map has one probe, "retrieval": means over runs, with the runs beside it. layout None: as many layers and
        heads as the keys show. A head with an empty list has no score.
        """
        given = source if isinstance(source, Mapping) else read_json(os.fspath(source))
        where = "retrieval scores" if isinstance(source, Mapping) else os.fspath(source)
        table: dict[tuple[int, int], Sequence[float]] = {}
        for key, values in given.items() if isinstance(given, Mapping) else [("", None)]:
            match = _PAIR.fullmatch(key) if isinstance(key, str) else None
            if match is None or not isinstance(values, list | tuple) or not all(_is_number(v) for v in values):
                raise InputError(
                    f'{where}: {key!r} cannot be read; expected {{"layer-head": [score of each run, ...]}}'
                )
            table[int(match[1]), int(match[2])] = values
        if not table:
            raise InputError(f'{where}: holds no head; expected {{"layer-head": [score of each run, ...]}}')
        if layout is None:
            layout = Layout.of([1 + max(head for _, head in table)] * (1 + max(layer for layer, _ in table)))
        longest = max(map(len, table.values()))
        runs = [
            {Head(*place): values[run] for place, values in table.items() if run < len(values)}
            for run in range(longest)
        ]
        return cls({}, layout, source=where, runs={"retrieval": runs})

    def to_retrieval_json(self, path: str | os.PathLike[str], probe: str = "retrieval") -> None:
        """Write the main tower's runs of one probe as ``{"layer-head": [...]}``; scores without runs are one."""
        table = self.of(probe)
        runs = self.runs.get(self._name(probe)) or [{h: score for h, score in table.items() if score is not None}]
        lists = {f"{h.layer}-{h.head}": [run[h] for run in runs if h in run] for h in self.layout.heads()}
        write_text(path, _compact(lists) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per head: its address, tower, layer, head, then a column per probe (empty: no score)."""
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["address", "tower", "layer", "head", *self.scores])
            for head in self.layout.heads("*"):
                row = (table[head] for table in self.scores.values())
                writer.writerow([head, head.tower, head.layer, head.head, *("" if s is None else s for s in row)])

    def _repr_html_(self) -> str:
        """The strongest heads of every probe, for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td style='text-align:left'>"
            + ", ".join(f"{head} <small>{table[head]:.3g}</small>" for head in self.top(name, 5, tower="*"))
            + "</td></tr>"
            for name, table in self.scores.items()
        )
        return f"<table><caption>{html.escape(repr(self))}</caption><tbody>{rows}</tbody></table>"

    def _name(self, probe: str | None) -> str:
        table = self.of(probe)
        return next(name for name, known in self.scores.items() if known is table)


def _compact(value: Any) -> str:

    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(probe: str, head: Head, score: Any) -> float | None:
    if score is None:
        return None
    value = float(score)
    if math.isinf(value):
        raise ValueError(
            f"HeadMap: {probe!r} of head {head} is {value}; expected a finite number, or None for no score"
        )
    return None if math.isnan(value) else value


def _means(runs: Sequence[Mapping[Head, float]]) -> dict[Head, float | None]:
    values: dict[Head, list[float]] = {}
    for run in runs:
        for head, score in run.items():
            values.setdefault(head, []).append(score)
    return {head: math.fsum(scores) / len(scores) for head, scores in values.items()}


def _parsed(table: Mapping[str, Any]) -> dict[Head, Any]:
    return {Head.parse(address): None if score is None else float(score) for address, score in table.items()}


def _positive(where: str, k: int) -> int:
    if k < 1:
        raise ValueError(f"HeadMap.{where}: k is {k}; expected at least 1")
    return k


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for index in order[start:stop]:
            ranks[index] = (start + stop + 1) / 2
        start = stop
    return ranks
