"""`headwise papers` and `headwise reproduce`: the catalogue, and running its claims."""

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

import headwise
from headwise.commands.common import DEFAULT_OUT, Device, Json, Output, Seed, device_of, output, quiet_libraries
from headwise.errors import InputError

__all__ = ["papers", "reproduce"]


def papers(
    slug: Annotated[str | None, typer.Argument(help="One paper; left out: the whole catalogue.")] = None,
    as_json: Json = False,
) -> None:
    """List the papers: what each is, where its code is, its claims and what came out."""
    from headwise.papers.recorded import catalogue

    with output(as_json) as said:
        found = catalogue(slug)
        if as_json:
            return said.write([{"headwise": headwise.__version__, "schema": 1, **one} for one in found])
        if slug is not None:
            return _one(found[0])
        for one in found:
            counts = one["counts"]
            claims = "" if counts is None else ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            stale = " (stale)" if one["recorded"] and one["recorded"]["stale"] else ""
            print(f"{one['status']:8} {one['slug']:34} {one['year']}  {one['title']}")
            if claims:
                print(f"{'':9}{claims}{stale}")
        working = sum(one["status"] == "works" for one in found)
        print(f"\n{working} of {len(found)} work here; `headwise papers SLUG` shows one, `headwise reproduce` runs it")


def _one(paper: dict[str, Any]) -> None:
    print(f"{paper['title']}\n{paper['authors']} ({paper['year']}), {paper['venue'] or 'preprint'}")
    if paper["arxiv"]:
        print(f"arXiv {paper['arxiv']}")
    print(f"\nstatus   {paper['status']}" + "".join(f"\n         missing: {item}" for item in paper["missing"]))
    print(f"area     headwise.{paper['area']}\ncode     {paper['module'] or 'none yet'}")
    recorded = paper["recorded"]
    if recorded:
        changed = f"; stale, changed since: {', '.join(recorded['stale'])}" if recorded["stale"] else ""
        print(f"run      recorded with seeds {', '.join(map(str, recorded['seeds']))}{changed}")
    if paper["changed"]:
        _wrapped(f"changed  {paper['changed']}", " " * 9)
    if paper["claims"]:
        print()
        _rows(paper["claims"])
        print(f"\nrun it: headwise reproduce {paper['slug']}")


def _rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        kind = "" if row["kind"] == "claim" else f" ({row['kind']})"
        _wrapped(f"{row['id']}{kind}: {row['claim']}", "  ")
        figure = {"paper": row["paper_figure"], "here": row["measured"], "control": row["control"]}
        for name, value in figure.items():
            if value is not None:
                _wrapped(f"    {name:9} {value}")
        _wrapped(f"    {'criterion':9} {row['criterion']}")
        verdict = "untestable" if row["kind"] == "untestable" else row["verdict"] or "not run"
        _wrapped(f"    {'verdict':9} {verdict}" + (f": {row['known']}" if row["known"] else ""))


def _wrapped(line: str, indent: str = " " * 14) -> None:
    """Print a line; in a terminal broken at words, further lines indented."""
    if sys.stdout.isatty():
        line = textwrap.fill(line, min(110, shutil.get_terminal_size().columns), subsequent_indent=indent)
    print(line)


def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers, as `headwise papers` names them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every paper that can be run.")] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Run so many seeds and write the recorded run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help=f"Folder for pictures ({DEFAULT_OUT}).")] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run the claims of papers at small scale: the paper's figure, what is measured here, control, verdict."""
    if bool(slugs) == everything:
        raise InputError(
            "reproduce: name papers, or give --all" if not slugs else "reproduce: give papers or --all, not both"
        )
    from headwise.papers.running import reproduce as run

    with output(as_json) as said:
        found = _run(said, run, slugs or [], seed, seeds, out, device)
        if as_json:
            marked = [{"headwise": headwise.__version__, "schema": 1, **one} for one in found]
            said.write(marked[0] if len(marked) == 1 and not everything else marked)
        else:
            for one in found:
                print(f"\n{one['paper']}, seed {one['seed']}, {one['seconds']:.0f} s")
                _rows(one["claims"])
                for path in one["figures"]:
                    print(f"picture: {path}")
            print()
            for one in found:
                print(f"{one['paper']}: {_summary(one['claims'])}")
    if any(_failed(row) for one in found for row in one["claims"]):
        raise typer.Exit(1)


def _run(
    said: Output, run: Any, slugs: list[str], seed: int, seeds: int | None, out: Path | None, device: str | None
) -> list[dict[str, Any]]:
    from headwise.papers.record import find_paper

    for slug in slugs:
        find_paper(slug)  # refused before torch is imported
    quiet_libraries()
    return run(*slugs, seed=seed, seeds=seeds, out=out, device=device_of(device), log=said.log)


def _summary(rows: list[dict[str, Any]]) -> str:
    from headwise.papers.recorded import count_verdicts

    return ", ".join(f"{count} {what}" for what, count in count_verdicts(rows).items() if count) or "no rows"


def _failed(row: dict[str, Any]) -> bool:
    """A check that fails, or a claim that is not reproduced without a known reason."""
    if row["kind"] == "untestable" or row["verdict"] == "reproduced":
        return False
    return row["kind"] == "check" or (row["verdict"] == "not reproduced" and not row["known"])
