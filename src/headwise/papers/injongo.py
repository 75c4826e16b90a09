"""Intents and slots in 16 African languages."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="injongo",
    title="INJONGO: A Multicultural Intent Detection and Slot-filling Dataset for 16 African Languages",
    authors="Yu, Alabi, Bukula, Zhuang, Lee et al.",
    year=2025,
    venue="ACL 2025",
    arxiv="2502.09814",
    repository="McGill-NLP/Injongo",
    area="tasks",
    missing="planned",
)
