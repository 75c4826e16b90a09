"""From what a scan found to the data of its report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headwise.attend.head_map import HeadMap
from headwise.report.html import compare
from headwise.report.suggestions import suggest

__all__ = ["report_document"]

# What scores are measured in, and where their colours start and may end; the others are shares of attention.
_UNITS: dict[str, tuple[str, list[float | None]]] = {
    "entropy": ("share of the maximum", [0, 1]),
    "entropy-nats": ("nats", [0, None]),
    "distance": ("tokens", [0, None]),
    "distance-share": ("share of the text so far", [0, 1]),
    "contribution": ("share of what the layer writes", [0, None]),
    "output-norm": ("norm", [0, None]),
    "dormant": ("share of tokens", [0, 1]),
    "retrieval": ("share of the copied tokens", [0, None]),
}


def report_document(
    scores: HeadMap,
    sentences: Mapping[str, str],
    *,
    texts: Sequence[Mapping[str, Any]] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    other: HeadMap | None = None,
    model_argument: str = "",
    map_path: str = "",
    notes: Iterable[str] = (),
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The data for `write_report`: units, strongest heads and suggested commands filled in for every probe.

    sentences: what each probe means. texts, examples: as `headwise.report.html` describes them. other: a map to compare
    with. model_argument, map_path: how the suggested commands name the model and the saved map; empty leaves them out.
    """
    main = scores.layout.main.name
    probes = {}
    for name, table in scores.scores.items():
        unit, limits = _UNITS.get(name, ("share of attention", [0, 1]))
        tries = []
        for tower in scores.layout.towers:
            if scores.top(name, 1, tower=tower.name):
                prefix = "" if tower.name == main else tower.name
                tries += suggest(name, model=model_argument, map_path=map_path, tower=prefix)
        probes[name] = {
            "sentence": sentences.get(name, ""),
            "unit": unit,
            "range": limits,
            "scores": {str(head): score for head, score in table.items()},
            "try": tries,
        }
    return {
        "model": scores.model,
        "source": scores.source,
        "towers": scores.layout.to_json(),
        "probes": probes,
        "texts": list(texts),
        "examples": list(examples),
        "comparison": None if other is None else compare(scores, other),
        "notes": list(notes),
        "versions": dict(versions or {}),
    }
