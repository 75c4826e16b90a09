"""Keep the best-scored documents of each domain: in memory that depends on the number of domains, not of documents.

The scores are read once and lie in a file without a name until they are sorted there, domain by domain; the rows are
read again to be written. Which documents are kept is what `headwise.tasks.select_documents` says of the same scores.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from headwise._files import atomic_path
from headwise._score_job import Job, fingerprint, read_rows
from headwise.errors import InputError
from headwise.tasks.documents import Corpus, quota

__all__ = ["keep_best"]

HELD = 2**16  # scores that are in memory at once
ENTRY = np.dtype([("domain", "<u4"), ("score", "<f8")])


@dataclass
class Domain:
    """scored: its documents with a score. least: the lowest score that is kept; ties: how many with that very score."""

    number: int
    scored: int = 0
    kept: int = 0
    least: float | None = None
    ties: int = 0

    def takes(self, score: float | None) -> bool:
        """Is the next document kept? Of those with the lowest score that is, the first are."""
        if score is None or self.least is None or score < self.least:
            return False
        if score == self.least:
            self.ties -= 1
            return self.ties >= 0
        return True


def keep_best(
    scores: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    fraction: float = 0.2,
    corpus: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write the best `fraction` of each domain of what `score_corpus` wrote, in order of the corpus; returns counts.

    out: a .jsonl file. corpus: what was scored; the chosen records are then written whole, their score added under
    "attention_influence"; None writes the rows of the scores. Memory grows with the number of domains alone; while it
    is at work it needs 20 bytes a document beside `out`, on the disk.
    Raises InputError for scores of an unfinished job, for a corpus that does not match them, and for an output that
    would overwrite either.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction: {fraction}; expected more than 0, at most 1, such as 0.2")
    if Path(out).suffix not in (".jsonl", ".ndjson"):
        raise InputError(f"out: {Path(out).name} must end in .jsonl")
    for name, given in (("scores", scores), ("corpus", corpus)):
        if given is not None and Path(out).resolve() == Path(given).resolve():
            raise InputError(f"out: {out} is the file of the {name}; choose another file")
    recorded = Job.recorded(scores) or {}
    source = None
    if corpus is not None:
        names = recorded.get("fields", {"text": None, "domain": "domain", "id": "id"})
        source = Corpus(os.fspath(corpus), **names)
        if "corpus" in recorded and recorded["corpus"] != fingerprint(source):
            raise InputError(f"corpus: {corpus} is not what {scores} was scored from")
    with atomic_path(out) as temporary:
        with tempfile.TemporaryFile(dir=temporary.parent) as scratch:
            domains, total = _spill(scores, scratch)
            _least(domains, scratch, temporary.parent, fraction)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row, score, name in _joined(scores, source):
                if name in domains and domains[name].takes(score):
                    domains[name].kept += 1
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        "documents": total,
        "scored": sum(one.scored for one in domains.values()),
        "kept": sum(one.kept for one in domains.values()),
        "domains": [
            {"domain": name, "scored": one.scored, "kept": one.kept, "least": one.least}
            for name, one in domains.items()
        ],
        "file": str(out),
    }


def _spill(scores: str | os.PathLike[str], scratch: IO[bytes]) -> tuple[dict[str | None, Domain], int]:
    """Write (domain, score) of every document that has one, in order; the domains, and how many documents there are."""
    domains: dict[str | None, Domain] = {}
    held: list[tuple[int, float]] = []
    total = 0
    for row in read_rows(scores):
        total += 1
        score = _score_of(row)
        if score is not None:
            found = domains.setdefault(row.get("domain"), Domain(len(domains)))
            found.scored += 1
            held.append((found.number, score))
            if len(held) == HELD:
                scratch.write(np.array(held, ENTRY).tobytes())
                held = []
    scratch.write(np.array(held, ENTRY).tobytes())
    return domains, total


def _score_of(row: dict[str, Any]) -> float | None:
    """Raises InputError for a score that is no number; NaN is none, as null is."""
    score = row["score"]
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise InputError(f"scores: {score!r} is no score; give what `headwise score` wrote")
    return None if score is None or score != score else float(score)


def _least(domains: dict[str | None, Domain], scratch: IO[bytes], folder: Path, fraction: float) -> None:
    """Find each domain's lowest score that is kept: its scores are laid side by side in a second file and sorted."""
    counts = np.array([one.scored for one in domains.values()], dtype=np.int64)
    if not len(counts):
        return
    starts = np.cumsum(counts) - counts
    with tempfile.TemporaryFile(dir=folder) as laid:
        placed = np.memmap(laid, "<f8", "w+", shape=(int(counts.sum()),))
        free = starts.copy()
        scratch.seek(0)
        while block := scratch.read(HELD * ENTRY.itemsize):
            entries = np.frombuffer(block, ENTRY)
            entries = entries[np.argsort(entries["domain"], kind="stable")]
            present, first, many = np.unique(entries["domain"], return_index=True, return_counts=True)
            within = np.arange(len(entries)) - np.repeat(first, many)
            placed[np.repeat(free[present], many) + within] = entries["score"]
            free[present] += many
        for one in domains.values():
            part = placed[starts[one.number] : starts[one.number] + one.scored]
            part.sort()
            if wanted := quota(one.scored, fraction):
                one.least = float(part[-wanted])
                one.ties = wanted - (one.scored - int(np.searchsorted(part, one.least, "right")))
        del placed


def _joined(
    scores: str | os.PathLike[str], corpus: Corpus | None
) -> Iterator[tuple[dict[str, Any], float | None, str | None]]:
    """What is written for each document, its score and its domain."""
    rows = read_rows(scores)
    if corpus is None:
        yield from ((row, _score_of(row), row.get("domain")) for row in rows)
        return
    for document in corpus.read():
        row = next(rows, None)
        if row is None or (row["file"], row["line"]) != (document.file, document.line):
            raise InputError(
                f"corpus: {document.file}, line {document.line} is not in the scores; give what was scored"
            )
        record = document.record or {"text": document.text}
        yield {**record, "attention_influence": row["score"]}, _score_of(row), row.get("domain")
    if next(rows, None) is not None:
        raise InputError("corpus: there are more scores than documents in it; give what was scored")
