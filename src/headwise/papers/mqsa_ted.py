"""Queries of several window lengths, and item transitions distilled into embeddings, for recommendation."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="mqsa-ted",
    title=(
        "Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for "
        "Sequential Recommendation"
    ),
    authors="Zhu, Shi, Zhang, Wu, Mo, Nie",
    year=2024,
    venue="WSDM 2024",
    repository="zhuty16/MQSA-TED",
    area="attention",
    missing="planned",
)
