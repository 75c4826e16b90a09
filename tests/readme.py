"""Write the generated part of README.md: the papers that work, from the catalogue. `make readme` runs it."""

import sys
from pathlib import Path

from headwise.papers.recorded import catalogue, count_verdicts

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- papers: written by `make readme` -->\n", "<!-- end of papers -->\n"


def papers_section() -> str:
    """How many papers work, and a table of those that do."""
    papers = catalogue()
    working = [paper for paper in papers if paper["status"] == "works"]
    lines = [f"{len(working)} of {len(papers)} papers of the catalogue work here so far.", ""]
    if working:
        lines += ["| paper | code | rows | outcome at small scale |", "| --- | --- | --- | --- |"]
    for paper in working:
        counts = count_verdicts(paper["claims"])
        outcome = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
        cited = f"{paper['title']} ({paper['year']})"
        if paper["arxiv"]:
            cited = f"[{cited}](https://arxiv.org/abs/{paper['arxiv']})"
        lines.append(f"| {cited}, `{paper['slug']}` | `{paper['module']}` | {len(paper['claims'])} | {outcome} |")
    return "\n".join(lines).rstrip() + "\n"


def rewritten(text: str) -> str:
    """The README with its generated part made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{papers_section()}{END}{after}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(rewritten(text), encoding="utf-8")
    sys.stdout.write(papers_section())
