"""Recorded runs (``results/<slug>.json``), whether they are stale, and each paper's derived status."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwise._files import read_json
from headwise.papers.record import Paper, RecordFile, find_paper, record_files

__all__ = ["catalogue", "recorded_run", "status_of"]

PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The root of the source tree this package is imported from, or None for an installed copy."""
    root = PACKAGE.parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "headwise") == PACKAGE else None


def results_folder() -> Path:
    """Where recorded runs lie: in the source tree, or inside an installed package."""
    root = checkout()
    return root / "results" if root else PACKAGE / "_results"


def recorded_run(slug: str) -> dict[str, Any] | None:
    """The recorded run of a paper, or None where there is none."""
    path = results_folder() / f"{slug}.json"
    return read_json(path) if path.is_file() else None


def _rows_text(paper: Paper) -> str:
    # Criteria decide what a run means; notes about it (known, missing, where a figure was seen) do not.
    return json.dumps([[row.id, row.kind, row.claim, row.criterion, row.control] for row in paper.claims])


def own_files(record: RecordFile) -> dict[str, str]:
    """The files a recorded run depends on, relative to the package, with their sha256.

    These are the paper's file (its code and rows), the modules that implement it, and its specimens' files.
    Raises ValueError for a module or specimen that is not there.
    """
    found = {f"papers/{record.path.name}": _sha((record.code + _rows_text(record.paper)).encode())}
    for name in record.paper.modules:
        path = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if not path.is_file():
            raise ValueError(f"{record.path}: modules names {name}, which is not there; mend the record")
        found[str(path.relative_to(PACKAGE).as_posix())] = _sha(path.read_bytes())
    for name in record.paper.specimens:
        files = sorted(path for path in (PACKAGE / "specimens" / "weights" / name).rglob("*") if path.is_file())
        # A specimen that is built by code has no weights: its module stands for it.
        for path in files or [PACKAGE / "specimens" / f"{name.replace('-', '_')}.py"]:
            if not path.is_file():
                raise ValueError(f"{record.path}: specimens names {name}, which is not there; mend the record")
            found[str(path.relative_to(PACKAGE).as_posix())] = _sha(path.read_bytes())
    return found


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stale_files(record: RecordFile, run: Mapping[str, Any]) -> list[str]:
    """Files that changed, came or went since the run was recorded."""
    then, now = run["files"], own_files(record)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def known_reason(paper: Paper, row_id: str, run: Mapping[str, Any] | None) -> str | None:
    """A row's ``known``, which counts only where a recorded run shows the row unreproduced."""
    rows = {row["id"]: row for row in run["claims"]} if run else {}
    shown = rows.get(row_id, {}).get("verdict") in ("not reproduced", "inconclusive")
    return next((row.known for row in paper.claims if row.id == row_id), None) if shown else None


def has_tests(paper: Paper, run: Mapping[str, Any] | None) -> bool:
    """Whether the paper's test file exists; an installed copy has no tests and asks its recorded run."""
    root = checkout()
    if root is None:
        return bool(run and run.get("test"))
    return (root / test_file(paper)).is_file()


def test_file(paper: Paper) -> str:
    return f"tests/papers/test_{paper.module_name}.py"


def status_of(paper: Paper) -> str:
    """``works``, ``partial`` or ``planned``, from what is there.

    works: nothing is missing, a recorded run has every row, and the paper's test file exists.
    planned: no row and no run yet. partial: in between.
    """
    run = recorded_run(paper.slug)
    if not paper.claims and not record_files()[paper.slug].has_run:
        return "planned"
    recorded = {row["id"] for row in run["claims"]} if run else set()
    complete = bool(paper.claims) and {row.id for row in paper.claims} <= recorded
    return "works" if paper.missing is None and complete and has_tests(paper, run) else "partial"


def missing_of(paper: Paper) -> list[str]:
    """What keeps a paper from ``works``, in words."""
    run = recorded_run(paper.slug)
    recorded = {row["id"] for row in run["claims"]} if run else set()
    lacking = [row.id for row in paper.claims if row.id not in recorded]
    found = [paper.missing] if paper.missing else []
    if not run and paper.claims:
        found.append("a recorded run")
    elif lacking:
        found.append(f"the recorded run lacks {', '.join(lacking)}")
    if paper.claims and not has_tests(paper, run):
        found.append("its test file")
    return found


def catalogue(slug: str | None = None) -> list[dict[str, Any]]:
    """The catalogue as documents, one per paper: what it is, where its code is, its claims, its status.

    slug: only this paper. Claims carry what the recorded run measured; ``stale`` lists files changed since.
    """
    papers = [find_paper(slug)] if slug is not None else [record.paper for record in record_files().values()]
    return [_document(record_files()[paper.slug]) for paper in papers]


def _document(record: RecordFile) -> dict[str, Any]:
    paper, run = record.paper, recorded_run(record.paper.slug)
    measured = {row["id"]: row for row in run["claims"]} if run else {}
    claims = []
    for row in paper.claims:
        then = measured.get(row.id, {})
        claims.append(
            {
                "id": row.id,
                "kind": row.kind,
                "claim": row.claim,
                "paper_figure": row.paper_figure,
                "measured": then.get("measured"),
                "control": then.get("control") or row.control,
                "criterion": row.criterion,
                "verdict": then.get("verdict"),
                "known": known_reason(paper, row.id, run),
            }
        )
    return {
        "slug": paper.slug,
        "title": paper.title,
        "year": paper.year,
        "area": paper.area,
        "module": paper.modules[0] if paper.modules else None,
        "claims": claims,
        "status": status_of(paper),
        "missing": missing_of(paper),
        "changed": paper.changed,
        "authors": paper.authors,
        "venue": paper.venue,
        "arxiv": paper.arxiv,
        "repository": paper.repository,
        "counts": count_verdicts(claims) if run else None,
        "recorded": {"seeds": run["seeds"], "stale": stale_files(record, run)} if run else None,
    }


def count_verdicts(claims: list[dict[str, Any]]) -> dict[str, int]:
    """How many rows were reproduced, not reproduced, inconclusive, untestable."""
    counts = {"reproduced": 0, "not reproduced": 0, "inconclusive": 0, "untestable": 0}
    for row in claims:
        verdict = "untestable" if row["kind"] == "untestable" else row["verdict"]
        if verdict in counts:
            counts[verdict] += 1
    return counts
