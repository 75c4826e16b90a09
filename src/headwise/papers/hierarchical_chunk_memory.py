"""Attend to chunks of the past first, then inside the best of them."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="hierarchical-chunk-memory",
    title="Towards mental time travel: a hierarchical memory for reinforcement learning agents",
    authors="Lampinen, Chan, Banino, Hill",
    year=2021,
    venue="NeurIPS 2021",
    arxiv="2105.14039",
    repository="google-deepmind/deepmind-research",
    area="memory",
    missing="planned",
)
