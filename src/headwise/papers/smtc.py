"""Slots from semantics and temporal correspondence in video."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="smtc",
    title="Semantics Meets Temporal Correspondence: Self-supervised Object-centric Learning in Videos",
    authors="Qian, Ding, Liu, Lin",
    year=2023,
    venue="ICCV 2023, pp. 16675-16687",
    arxiv="2308.09951",
    repository="shvdiwnkozbw/SMTC",
    area="slots",
    missing="planned",
)
