"""Sequence models as associative memories: the choice of objective, retention and learner."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="miras",
    title=(
        "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and "
        "Online Optimization"
    ),
    authors="Behrouz, Razaviyayn, Zhong, Mirrokni",
    year=2025,
    arxiv="2504.13173",
    area="memory",
    missing="planned",
)
