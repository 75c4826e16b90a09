"""Slots shepherded to objects by a refining kernel and a few known points."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="slash",
    title="Shepherding Slots to Objects: Towards Stable and Robust Object-Centric Learning",
    authors="Kim, Choi, Choi, Kim",
    year=2023,
    venue="CVPR 2023",
    arxiv="2303.17842",
    repository="object-understanding/SLASH",
    area="slots",
    missing="planned",
)
