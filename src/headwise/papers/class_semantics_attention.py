"""Attention by class semantics for finding actions in video."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="class-semantics-attention",
    title="Class Semantics-based Attention for Action Detection",
    authors="Sridhar, Quader, Muralidharan, Li, Dai, Lu",
    year=2021,
    venue="ICCV 2021, pp. 13739-13748",
    arxiv="2109.02613",
    area="attention",
    missing="planned",
)
