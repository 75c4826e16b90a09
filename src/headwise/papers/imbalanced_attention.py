"""Boost local and summary visual tokens to lessen hallucination."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="imbalanced-attention",
    title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
    authors="Arif, Dip, Hussain, Zhang, Thomas",
    year=2025,
    venue="CVPR 2025 workshop TMM-OpenWorld",
    arxiv="2501.12206",
    repository="hasanar1f/PAINT",
    area="steering",
    missing="planned",
)
