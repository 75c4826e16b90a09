"""Run papers: measure every row of a paper's claims, over one seed or several, and record it.

A paper's ``reproduce(run)`` returns ``{row id: Measured}`` for each row that is not untestable.
"""

import importlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import headwise
from headwise._files import atomic_path, write_text
from headwise.errors import InputError
from headwise.papers.record import Paper, find_paper, record_files
from headwise.papers.recorded import (
    checkout,
    known_reason,
    own_files,
    recorded_run,
    results_folder,
    status_of,
    test_file,
)
from headwise.papers.verdicts import Measured, row_document, summarise_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "reproduce", "runnable"]

T = TypeVar("T")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """What a paper's ``reproduce`` is given: one seed, one device, a folder for its pictures, a log."""

    paper: Paper
    seed: int
    device: str
    out: Path
    say: Callable[[str], None] = _to_stderr
    figures: list[Path] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def log(self, text: str) -> None:
        """Say something to the person who waits, with the seconds so far."""
        self.say(f"{self.paper.slug}: {time.monotonic() - self.started:4.0f} s  {text}")

    def progress(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Go through items, saying how far every ten seconds or so."""
        if total is None and isinstance(items, Sequence):
            total = len(items)
        said = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self.log(f"{what}: {done}{f' of {total}' if total is not None else ''}")
            yield item

    def save_figure(self, figure: "Figure", name: str = "figure") -> Path:
        """Save a matplotlib figure as PNG under the run's folder; its path is part of the result."""
        path = self.out / f"{self.paper.slug}-{name}.png"
        with atomic_path(path) as temporary:
            # Without metadata the same picture is the same file, so that a recorded run can be compared.
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        self.figures.append(path)
        return path


def runnable() -> list[str]:
    """Slugs of the papers whose claims can be run."""
    return [slug for slug, record in record_files().items() if record.has_run and record.paper.claims]


def _checked_rows(paper: Paper, rows: Any) -> dict[str, Measured]:
    wanted = [row.id for row in paper.claims if row.kind != "untestable"]
    if not isinstance(rows, Mapping) or not all(isinstance(row, Measured) for row in rows.values()):
        raise TypeError(f"{paper.slug}: reproduce(run) must return a dict of row id to Measured")
    if set(rows) != set(wanted):
        lacking, extra = sorted(set(wanted) - set(rows)), sorted(set(rows) - set(wanted))
        raise ValueError(f"{paper.slug}: reproduce(run) left out rows {lacking} and made up rows {extra}")
    return {name: rows[name] for name in wanted}


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _run_seed(paper: Paper, seed: int, device: str, out: Path, say: Callable[[str], None]) -> tuple[Run, dict, float]:
    module = importlib.import_module(f"headwise.papers.{paper.module_name}")
    _seed_everything(seed)
    run = Run(paper, seed, device, out, say)
    run.log(f"seed {seed} on {device}")
    rows = _checked_rows(paper, module.reproduce(run))
    return run, rows, time.monotonic() - run.started


def _document(
    paper: Paper, seeds: Sequence[int], seconds: float, rows: Sequence[dict[str, Measured]], figures: list[Path]
) -> dict[str, Any]:
    recorded = recorded_run(paper.slug)
    claims = []
    for claim in paper.claims:
        measured = [] if claim.kind == "untestable" else [one[claim.id] for one in rows]
        claims.append(row_document(claim, measured, known_reason(paper, claim.id, recorded)))
    return {
        "paper": paper.slug,
        "seed": seeds[0],
        "seconds": round(seconds, 1),
        "claims": claims,
        "figures": [str(path) for path in figures],
    }


def versions(device: str) -> dict[str, str]:
    """What a recorded run was made with."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "numpy", "scipy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {
        "headwise": headwise.__version__,
        "python": platform.python_version(),
        **found,
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
    }


def _folder(out: str | Path | None, default: Path) -> Path:
    folder = Path(out) if out is not None else default
    with atomic_path(folder / ".writable"):
        pass  # refuses a folder that cannot be written before minutes are spent
    (folder / ".writable").unlink()
    return folder


def reproduce(
    *slugs: str,
    seed: int = 0,
    seeds: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    log: Callable[[str], None] = _to_stderr,
) -> list[dict[str, Any]]:
    """Run the claims of papers at small scale; one document per paper, as ``headwise reproduce --json`` prints.

    slugs: the papers; none means every paper that can be run.
    seeds: run so many seeds from ``seed`` on and write the recorded run ``<out>/<slug>.json``.
    out: folder for pictures (and recorded runs); None means ``headwise-out``, or ``results`` with seeds.
    device: None means "cpu".
    Raises InputError for an unknown paper, one that cannot be run yet, or a folder that cannot be written.
    """
    papers = [find_paper(slug) for slug in (slugs or runnable())]
    for paper in papers:
        if paper.slug not in runnable():
            raise InputError(
                f"reproduce: {paper.slug} is {status_of(paper)} and cannot be run yet; "
                f"these can: {', '.join(runnable()) or 'none'}"
            )
    if seeds is not None and seeds < 1:
        raise InputError(f"reproduce: seeds is {seeds}; expected 1 or more, such as 3")
    if seeds is None:
        folder = _folder(out, Path("headwise-out"))
        return [_reproduce_once(paper, seed, device or "cpu", folder, log) for paper in papers]
    folder = _folder(out, results_folder() if checkout() else Path("results"))
    return [_record(paper, range(seed, seed + seeds), device or "cpu", folder, log) for paper in papers]


def _reproduce_once(paper: Paper, seed: int, device: str, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    run, rows, seconds = _run_seed(paper, seed, device, out, log)
    return _document(paper, [seed], seconds, [rows], run.figures)


def _record(paper: Paper, seeds: range, device: str, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Run several seeds and write the recorded run; pictures are the first seed's."""
    files = own_files(record_files()[paper.slug])
    runs = [_run_seed(paper, seed, device, out / "figures", log) for seed in seeds[:1]]
    pictures = runs[0][0].figures
    scratch = out / ".figures-of-further-seeds"
    try:
        runs += [_run_seed(paper, seed, device, scratch, log) for seed in seeds[1:]]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    rows = [one for _, one, _ in runs]
    document = _document(paper, list(seeds), sum(seconds for _, _, seconds in runs), rows, pictures)
    recorded = {
        "headwise": headwise.__version__,
        "schema": 1,
        "paper": paper.slug,
        "seeds": list(seeds),
        "seconds": [round(seconds, 1) for _, _, seconds in runs],
        # The reason a claim is known not to hold lives in the record; here only what was measured.
        "claims": [
            {key: value for key, value in row.items() if key != "known"}
            | {"values": summarise_values([one[row["id"]] for one in rows]) if row["kind"] != "untestable" else {}}
            for row in document["claims"]
        ],
        "figures": [path.relative_to(out).as_posix() for path in pictures],
        "versions": versions(device),
        "test": test_file(paper) if (root := checkout()) and (root / test_file(paper)).is_file() else None,
        "files": files,
    }
    write_text(out / f"{paper.slug}.json", json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")
    log(f"{paper.slug}: recorded in {out / f'{paper.slug}.json'}")
    return document
