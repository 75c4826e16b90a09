"""Slot models adapted to a scene at test time."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="slot-tta",
    title="Test-time adaptation with slot-centric models",
    authors="Prabhudesai, Goyal, Paul, van Steenkiste, Sajjadi, Aggarwal, Kipf, Pathak, Fragkiadaki",
    year=2023,
    venue="ICML 2023",
    arxiv="2203.11194",
    repository="mihirp1998/Slot-TTA",
    area="slots",
    missing="planned",
)
