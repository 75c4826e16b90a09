"""The table of a scan for the terminal; plain lines where output is no terminal."""

import sys
from io import StringIO
from typing import TextIO

from headwise.attend.head_map import HeadMap

__all__ = ["print_scan"]


def print_scan(scores: HeadMap, *, k: int = 5, file: TextIO | StringIO | None = None) -> None:
    """Print the k strongest heads of every probe with their scores, tower by tower.

    In a terminal a table; elsewhere tab-separated lines (probe, rank, head, score), which other programs can read.
    """
    out = sys.stdout if file is None else file
    towers = [tower.name for tower in scores.layout.towers]
    rows = [
        (
            probe,
            [(str(head), score) for head in scores.top(probe, k, tower=tower) if (score := table[head]) is not None],
        )
        for tower in towers
        for probe, table in scores.scores.items()
    ]
    rows = [(probe, strongest) for probe, strongest in rows if strongest]
    if not out.isatty():
        for probe, strongest in rows:
            for rank, (head, score) in enumerate(strongest, 1):
                print(probe, rank, head, f"{score:.4g}", sep="\t", file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("probe", no_wrap=True)
    for rank in range(1, max(len(strongest) for _, strongest in rows) + 1 if rows else 1):
        table.add_column(("strongest" if rank == 1 else str(rank)), no_wrap=True)
    for probe, strongest in rows:
        cells = (Text.assemble((head, "bold"), (f" {score:.3g}", "cyan")) for head, score in strongest)
        table.add_row(Text(probe), *cells)
    Console(file=out, highlight=False).print(table)
