"""A bottleneck of few elements, chosen by attention, that the rest is predicted from."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="consciousness-prior",
    title="The Consciousness Prior",
    authors="Bengio",
    year=2017,
    arxiv="1709.08568",
    area="attention",
    missing="planned",
)
