"""Each token attends to its nearest neighbours, in one to three dimensions."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="neighborhood-attention",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    authors="Hassani, Hwu, Shi",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2403.04690",
    repository="SHI-Labs/NATTEN",
    area="attention",
    missing="planned",
)
