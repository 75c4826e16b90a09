"""One self-contained HTML page about the heads of a model: maps, strongest heads, their attention over a text.

The page opens from disk, loads nothing (its content security policy forbids it) and shows every string from the data
as text. Its style, script and frame stand in `report/assets` and are put into the page when it is written.

The data of a report is a dict that JSON can hold:

    model        what the title says
    source       where the scores come from, in a few words ("the shipped text, 1,482 tokens"); may be missing
    towers       ``Layout.to_json()``; the main tower first
    probes       {name: {
                     sentence   what a high score means, in one sentence
                     unit       what the scores are ("share of attention", "nats"); may be missing for known probes
                     range      [low, high], either None; colours start at low; may be missing (then at 0)
                     scores     {head address: score or None}
                     top        addresses, strongest first; may be missing (then by score)
                     try        a command, or a list of commands or of {"do": sentence, "command": command}, with
                                "tower" where it is meant for a tower other than the main one;
                                `headwise.report.suggestions.suggest` makes them
                 }}
    texts        [{name, tokens: [string as a person reads it], special: [indices of tokens such as <s>]}]
    examples     [{probe, head, text: index into texts, focus: query index shown first or missing,
                   rows: [[query, [[key, weight], ...]], ...]}]; `sparse_rows` makes the rows from weights
    comparison   may be missing: {name, probes: {name: {scores: {address: this model minus the other},
                   correlation, overlap, k}}}; `compare` makes it from two head maps
    notes        how it was measured: sampled rows, windows, padding; may be missing
    versions     {"headwise": "0.1.0", "torch": ...}; may be missing
"""

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jaxtyping import Float
from torch import Tensor

import headwise
from headwise._files import write_text
from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap

__all__ = ["compare", "sparse_rows", "write_report"]

FLOOR = 0.005  # weights below it are never kept; the page says so
DETAIL = ((16, FLOOR), (8, 0.01), (5, 0.02))  # keys a row and their least weight, tried until the page is small enough
SHARE = ("share of attention", [0, 1])
UNITS: dict[
    str, tuple[str, Sequence[float | None]]
] = {  # of the probes that come with headwise, for data that gives none
    "sink": SHARE,
    "sinks": SHARE,
    "previous": SHARE,
    "duplicate": SHARE,
    "induction": SHARE,
    "induction-repeat": SHARE,
    "value-weighted-sink": ("share of what is moved", [0, 1]),
    "entropy": ("share of the maximum", [0, 1]),
    "entropy-nats": ("nats", [0, None]),
    "distance": ("tokens", [0, None]),
    "distance-share": ("share of the text so far", [0, 1]),
    "contribution": ("share of what the layer writes", [0, None]),
    "output-norm": ("norm", [0, None]),
    "dormant": ("share of tokens", [0, 1]),
    "retrieval": ("share of the copied tokens", [0, None]),
}
BUDGET = 900_000  # bytes of attention rows a page may hold, so that it stays below a megabyte


def write_report(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page. The file appears at once when it is complete, or not at all.

    data: as the docstring of this module says. Where examples would make the page larger than about a megabyte, weak
    weights are left out first, then whole heads, the weaker ones of every probe first; the page says what is missing.

    Raises ValueError for data of another form and InputError for a path that cannot be written.
    """
    document = _prepare(data)
    parts = {
        "title": html.escape(f"{document['model']} - headwise"),
        "version": html.escape(headwise.__version__),
        "css": _asset("report.css"),
        "js": _asset("report.js"),
        "data": _embed(document),
    }
    # One pass, so that nothing inside a part is taken for a place to fill.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))
    write_text(path, page)


def sparse_rows(
    weights: Float[Tensor, "t s"], *, keys: int = 12, queries: Sequence[int] | None = None
) -> list[list[Any]]:
    """The strongest keys of every row of one head's attention, as the ``rows`` of an example.

    queries: the position of each row; None means that rows end where the keys end, as in a causal model.
    """
    start = weights.shape[1] - weights.shape[0]
    positions = range(start, weights.shape[1]) if queries is None else queries
    if len(positions) != weights.shape[0]:
        raise ValueError(f"sparse_rows: {weights.shape[0]} rows but {len(positions)} queries; they must match")
    values, places = weights.detach().float().topk(min(keys, weights.shape[1]), dim=-1)
    return [
        [int(query), [[key, weight] for key, weight in zip(ks, ws, strict=True) if weight >= FLOOR]]
        for query, ks, ws in zip(positions, places.tolist(), values.tolist(), strict=True)
    ]


def compare(this: HeadMap, other: HeadMap, *, k: int = 10) -> dict[str, Any]:
    """The ``comparison`` of a report: differences, rank correlation and common top heads for probes that both have."""
    result: dict[str, Any] = {"name": other.model or "the other map", "probes": {}}
    for probe in this.probes:
        if probe not in other.probes:
            continue
        theirs = other.of(probe)
        scores = {
            str(head): score - reference
            for head, score in this.of(probe).items()
            if score is not None and (reference := theirs.get(head)) is not None
        }
        if len(scores) < 2:
            continue
        correlation = this.correlation(other, probe)
        common = min(k, len(this.top(probe, k)))
        result["probes"][probe] = {
            "scores": scores,
            "correlation": None if math.isnan(correlation) else correlation,
            "overlap": this.overlap(other, probe, k) if common else None,
            "k": common,
        }
    return result


def _asset(name: str) -> str:
    return (files("headwise.report") / "assets" / name).read_text(encoding="utf-8")


def _embed(document: Mapping[str, Any]) -> str:
    """JSON that cannot end its script element, open another, or break a line of a script."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # lone surrogates have no UTF-8


def _prepare(data: Mapping[str, Any]) -> dict[str, Any]:
    layout = Layout.from_json(_field(data, "towers", list, "report"))
    probes = _field(data, "probes", Mapping, "report")
    if not probes:
        raise ValueError("report: probes is empty; expected at least one probe with scores")
    document: dict[str, Any] = {
        "headwise": headwise.__version__,
        "schema": 1,
        "model": str(data.get("model") or "A model without a name"),
        "source": str(data.get("source") or ""),
        "towers": layout.to_json(),
        "probes": {str(name): _probe(str(name), probe, layout) for name, probe in probes.items()},
        "notes": [str(note) for note in data.get("notes") or []],
        "versions": {"headwise": headwise.__version__} | {k: str(v) for k, v in (data.get("versions") or {}).items()},
        "comparison": _comparison(data.get("comparison"), layout),
    }
    texts = data.get("texts") or []
    lengths = [len(_field(text, "tokens", Sequence, f"report: texts[{i}]")) for i, text in enumerate(texts)]
    examples = [_example(i, example, lengths, layout) for i, example in enumerate(data.get("examples") or [])]
    examples = _in_turns(examples)
    kept, document["floor"] = _within_budget(examples)
    if len(kept) < len(examples):
        document["notes"].append(
            f"Attention over the text is kept for {len(kept)} of {len(examples)} heads, to keep this page small."
        )
    document["examples"] = kept
    document["texts"] = [_text(i, text, kept) for i, text in enumerate(texts)]
    return document


def _field(data: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, str):
        raise ValueError(f"{where}: {name} is {type(value).__name__}; expected {getattr(kind, '__name__', kind)}")
    return value


def _scores(scores: Mapping[str, Any], layout: Layout) -> dict[str, float | None]:
    """Scores under the addresses of the layout, in its order; five digits are more than a page shows."""
    given = {layout.check(Head.parse(str(head))): score for head, score in scores.items()}
    known = {h: None if s is None or not math.isfinite(s) else float(f"{s:.5g}") for h, s in given.items()}
    return {str(head): known[head] for head in layout.heads("*") if head in known}


def _probe(name: str, probe: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    where = f"report: probe {name!r}"
    unit, limits = UNITS.get(name, ("", []))
    tries = probe.get("try") or []
    tries = [tries] if isinstance(tries, str | Mapping) else tries
    return {
        "sentence": str(probe.get("sentence") or ""),
        "unit": str(probe.get("unit") or unit),
        "range": list(probe.get("range") or limits) or None,
        "scores": _scores(_field(probe, "scores", Mapping, where), layout),
        "top": [str(layout.check(Head.parse(str(head)))) for head in probe.get("top") or []],
        "try": [
            {key: str(one.get(key) or "") for key in ("do", "command", "tower")}
            for one in ({"command": one} if isinstance(one, str) else one for one in tries)
        ],
    }


def _comparison(comparison: Mapping[str, Any] | None, layout: Layout) -> dict[str, Any] | None:
    if not comparison:
        return None
    probes = {
        str(name): {
            "scores": _scores(probe["scores"], layout),
            **{key: probe.get(key) for key in ("correlation", "overlap", "k")},
        }
        for name, probe in comparison["probes"].items()
    }
    return {"name": str(comparison.get("name") or "the other model"), "probes": probes}


def _example(index: int, example: Mapping[str, Any], lengths: Sequence[int], layout: Layout) -> dict[str, Any]:
    """One example with its rows packed as [query, key, weight in thousandths, key, weight, ...]."""
    where = f"report: examples[{index}]"
    text = example.get("text", 0)
    if not isinstance(text, int) or not 0 <= text < len(lengths):
        raise ValueError(f"{where}: text is {text!r}; there are {len(lengths)} texts")
    rows = []
    for query, pairs in _field(example, "rows", Sequence, where):
        row = [query]
        for key, weight in sorted(pairs, key=lambda pair: -pair[1]):
            if weight >= FLOOR:
                row += [key, round(1000 * weight)]
        outside = [position for position in [query, *row[1::2]] if not 0 <= position < lengths[text]]
        if outside:
            raise ValueError(f"{where}: row {query} names token {outside[0]}; its text has {lengths[text]} tokens")
        rows.append(row)
    packed = {
        "probe": str(example.get("probe") or ""),
        "head": str(layout.check(Head.parse(str(example["head"])))),
        "text": text,
        "rows": rows,
    }
    return packed | ({"focus": int(example["focus"])} if example.get("focus") is not None else {})


def _in_turns(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each head once, and the probes in turn: where room is short, every probe keeps its strongest heads."""
    turns: dict[str, int] = {}
    ordered: list[tuple[int, dict[str, Any]]] = []
    seen: set[tuple[str, int]] = set()
    for example in examples:
        turns[example["probe"]] = turn = turns.get(example["probe"], -1) + 1
        if (place := (example["head"], example["text"])) not in seen:
            seen.add(place)
            ordered.append((turn, example))
    return [example for _, example in sorted(ordered, key=lambda pair: pair[0])]


def _within_budget(examples: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """The examples that fit, weak keys left out first and whole heads last; and the weight below which keys went."""
    for keys, floor in DETAIL:
        slim = [
            example | {"rows": [_slim(row, keys, round(1000 * floor)) for row in example["rows"]]}
            for example in examples
        ]
        sizes = [len(json.dumps(example, separators=(",", ":"))) for example in slim]
        if sum(sizes) <= BUDGET:
            break
    kept = 0
    while kept < len(slim) and sum(sizes[: kept + 1]) <= BUDGET:
        kept += 1
    return slim[:kept], floor


def _slim(row: list[int], keys: int, floor: int) -> list[int]:
    pairs = list(zip(row[1::2], row[2::2], strict=True))[:keys]
    return [row[0], *(number for pair in pairs if pair[1] >= floor for number in pair)]


def _text(index: int, text: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A text, cut after the last token that an example speaks of."""
    rows = [row for example in examples if example["text"] == index for row in example["rows"]]
    end = 1 + max((max(row[0], *row[1::2]) if len(row) > 1 else row[0] for row in rows), default=-1)
    tokens = [str(token) for token in text["tokens"]]
    shown = {
        "name": str(text.get("name") or "Text"),
        "tokens": tokens[:end],
        "special": [i for i in text.get("special") or [] if i < end],
    }
    return shown | ({"cut": len(tokens)} if end < len(tokens) else {})
