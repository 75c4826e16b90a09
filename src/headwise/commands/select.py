"""`headwise select`: the best-scored documents of each domain."""

from pathlib import Path
from typing import Annotated

import typer

from headwise.commands.common import Json, document, output

__all__ = ["select"]


def select(
    scores: Annotated[Path, typer.Argument(help="What `headwise score` wrote: a file, or a folder of parts.")],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl file for the documents that are kept.")],
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="What was scored: its records are written whole; else the scores.")
    ] = None,
    fraction: Annotated[float, typer.Option("--fraction", help="Share of each domain to keep.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Keep the highest-scored share of each domain, in the order of the corpus.

    Scores compare documents of one domain; remove duplicates first, for what repeats scores high.
    """
    with output(as_json) as said:
        from headwise.api import keep_best

        found = keep_best(scores, out=out, fraction=fraction, corpus=corpus)
        if as_json:
            return said.write(document(**found))
        for one in found["domains"]:
            least = "" if one["least"] is None else f", scores from {one['least']:.3g}"
            print(f"{one['domain'] or 'no domain'}: {one['kept']:,} of {one['scored']:,} kept{least}")
        print(f"{found['kept']:,} of {found['documents']:,} documents written to {found['file']}")
