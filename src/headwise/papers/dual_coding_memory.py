"""An episodic memory with a code for language and one for vision: words learned in one shot."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="dual-coding-memory",
    title="Grounded Language Learning Fast and Slow",
    authors="Hill, Tieleman, von Glehn, Wong, Merzic, Clark",
    year=2021,
    venue="ICLR 2021",
    arxiv="2009.01719",
    repository="deepmind/dm_fast_mapping",
    area="memory",
    missing="planned",
)
