"""A neural memory that learns while it reads."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="titans",
    title="Titans: Learning to Memorize at Test Time",
    authors="Behrouz, Zhong, Mirrokni",
    year=2024,
    arxiv="2501.00663",
    area="memory",
    missing="planned",
)
