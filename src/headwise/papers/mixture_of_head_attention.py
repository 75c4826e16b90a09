"""A router lets each token use only some heads."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="mixture-of-head-attention",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    authors="Jin, Zhu, Yuan, Yan",
    year=2024,
    arxiv="2410.11842",
    repository="SkyworkAI/MoH",
    area="attention",
    missing="planned",
)
