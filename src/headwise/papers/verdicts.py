"""From measured rows to verdicts, over one seed or several, and to an exit code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headwise.papers.record import Claim
from headwise.papers.statistics import mean, sd, t_interval

__all__ = ["Measured", "Verdict", "exit_code", "verdict_of", "verdict_over_seeds"]

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run measured for one row.

    measured, control: what a person reads, with units.
    holds: whether the row's criterion is met by the measured numbers.
    margin: by how much (0 is exactly at the criterion, positive favours it); lets several seeds be weighed together.
    interval: of the margin, where it was estimated from a sample; one that covers 0 makes the row inconclusive.
    values: the numbers behind the words, by name; over several seeds each gets a mean, a spread and a worst case.
    """

    measured: str
    holds: bool
    control: str | None = None
    margin: float | None = None
    interval: tuple[float, float] | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.margin is not None and (self.margin >= 0) != self.holds:
            raise ValueError(
                f"Measured: margin {self.margin} and holds={self.holds} disagree; "
                "a criterion holds where its margin is 0 or more"
            )
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"Measured: interval {self.interval} is upside down; give (low, high)")


def verdict_of(row: Measured) -> Verdict:
    """The verdict of one run."""
    if row.interval is not None and row.interval[0] <= 0 <= row.interval[1]:
        return "inconclusive"
    return "reproduced" if row.holds else "not reproduced"


def verdict_over_seeds(kind: str, rows: Sequence[Measured]) -> Verdict:
    """The verdict of several seeds.

    Seeds that agree decide. A check must hold for every seed. A claim on which seeds disagree is decided by the
    mean margin where its 95 % interval over seeds excludes 0, and is inconclusive otherwise.
    """
    verdicts: list[Verdict] = [verdict_of(row) for row in rows]
    if len(set(verdicts)) == 1:
        return verdicts[0]
    if kind == "check":
        return "not reproduced" if "not reproduced" in verdicts else "inconclusive"
    margins = [row.margin for row in rows if row.margin is not None]
    if len(margins) == len(rows):
        low, high = t_interval(margins)
        if low > 0:
            return "reproduced"
        if high < 0:
            return "not reproduced"
    return "inconclusive"


def summarise_values(rows: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Each named number over the seeds: mean, sd, least, greatest and the list itself."""
    names = {name: None for row in rows for name in row.values}
    summary = {}
    for name in names:
        numbers = [float(row.values[name]) for row in rows if name in row.values]
        summary[name] = {
            "mean": mean(numbers),
            "sd": sd(numbers) if len(numbers) > 1 else None,
            "least": min(numbers),
            "greatest": max(numbers),
            "seeds": numbers,
        }
    return summary


def _over_seeds(texts: Sequence[str | None]) -> str | None:
    said = [text for text in texts if text is not None]
    return None if not said else said[0] if len(set(said)) == 1 else "; ".join(said)


def row_document(claim: Claim, rows: Sequence[Measured], known: str | None) -> dict[str, Any]:
    """One row of ``reproduce --json``: rows holds one Measured per seed, none for an untestable row."""
    verdict = verdict_over_seeds(claim.kind, rows) if rows else None
    return {
        "id": claim.id,
        "kind": claim.kind,
        "claim": claim.claim,
        "paper_figure": claim.paper_figure,
        "measured": _over_seeds([row.measured for row in rows]),
        "control": _over_seeds([row.control for row in rows]) if rows else claim.control,
        "criterion": claim.criterion,
        "verdict": verdict,
        "known": known if verdict != "reproduced" else None,
    }


def exit_code(documents: Sequence[Mapping[str, Any]]) -> int:
    """1 when a check fails, or a claim is not reproduced and nothing is known about why; else 0."""
    for document in documents:
        for row in document["claims"]:
            if row["verdict"] == "not reproduced" and (row["kind"] == "check" or not row["known"]):
                return 1
    return 0
