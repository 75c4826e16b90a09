"""What a paper's file says about it: the record and its claims, as plain literals.

A record is read by parsing the file, never by running it, so the catalogue of all papers answers at
once and without torch. A paper's file holds ``PAPER = Paper(...)`` with literal arguments and, once the
method is there, a function ``reproduce(run)``.
"""

import ast
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from headwise.errors import InputError

__all__ = ["Claim", "Paper", "find_paper", "papers_known"]

Kind = Literal["claim", "check", "untestable"]
AREAS = ("heads", "steering", "attention", "memory", "slots", "models", "tasks")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row: what is asserted, what the paper measured, and what must come out here.

    kind: ``claim`` is an asserting sentence of the abstract, whose criterion implies the sentence;
        ``check`` an identity, or a weaker but useful fact; ``untestable`` a sentence that cannot be tested here.
    claim: the sentence (for a claim or an untestable one, in the paper's words).
    paper_figure: the paper's own number and where it was seen; None where the paper gives none.
    criterion: what must be measured, written before the first run; for an untestable row, why it cannot be tested.
    control: what stands beside the measurement; None only for identities and untestable rows.
    known: why the claim is not reproduced at this scale; counts only with a recorded run that shows it.
    """

    id: str
    kind: Kind
    claim: str
    criterion: str
    paper_figure: str | None = None
    control: str | None = None
    known: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper of the catalogue.

    authors: as cited; "et al." where the list is long. venue: None for a preprint.
    arxiv: the identifier, None where there is none. repository: of the official code, "owner/name" on GitHub.
    area: the package of headwise that holds, or will hold, the method.
    modules: the modules that implement it, the main one first.
    specimens: the shipped models that its run uses; their files count for whether a recorded run is stale.
    missing: None, or what is not there yet.
    changed: None, or what of the set-up was changed after results had been looked at, before the recorded run.
    """

    slug: str
    title: str
    authors: str
    year: int
    area: str
    venue: str | None = None
    arxiv: str | None = None
    repository: str | None = None
    modules: tuple[str, ...] = ()
    specimens: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    missing: str | None = None
    changed: str | None = None

    @property
    def module_name(self) -> str:
        """The paper's file as a Python name: the slug with underscores."""
        return self.slug.replace("-", "_")


def _value(node: ast.expr, path: Path) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Paper", "Claim"):
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"{path}, line {node.lineno}: give {node.func.id} keyword arguments only")
        made = {"Paper": Paper, "Claim": Claim}[node.func.id]
        return made(**{str(keyword.arg): _value(keyword.value, path) for keyword in node.keywords})
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, path) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{path}, line {node.lineno}: a record is read unrun; write a plain literal here") from None


@dataclass(frozen=True)
class RecordFile:
    """A paper's file: its record, whether it can be reproduced, and its source without the record."""

    path: Path
    paper: Paper
    has_run: bool
    code: str  # the source outside the record: what decides, with the rows, whether a recorded run is stale


def read_record(path: Path) -> RecordFile | None:
    """The record in a file, by parsing; None when the file holds none.

    Raises ValueError for a record with anything but literals, and for a slug that is not the file's name.
    """
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["PAPER"]:
            paper = _value(node.value, path)
            if not isinstance(paper, Paper) or paper.module_name != path.stem:
                raise ValueError(f"{path}: PAPER must be a Paper whose slug is the file's name with hyphens")
            lines = source.splitlines(keepends=True)
            code = "".join(lines[: node.lineno - 1] + lines[node.end_lineno :])
            has_run = any(isinstance(item, ast.FunctionDef) and item.name == "reproduce" for item in tree.body)
            return RecordFile(path, paper, has_run, code)
    return None


@cache
def record_files() -> dict[str, RecordFile]:
    """Slug -> file, for every paper in this folder, sorted by slug."""
    found = [read_record(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    return {record.paper.slug: record for record in found if record is not None}


def papers_known() -> list[Paper]:
    """Every paper of the catalogue, sorted by slug."""
    return [record.paper for record in record_files().values()]


def find_paper(slug: str) -> Paper:
    """The paper of a slug; underscores and hyphens are alike. InputError names the nearest slug."""
    records = record_files()
    name = slug.strip().lower().replace("_", "-")
    if name not in records:
        near = difflib.get_close_matches(name, records, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"paper: {slug!r} is not in the catalogue; {hint}`headwise papers` lists all {len(records)}")
    return records[name].paper
