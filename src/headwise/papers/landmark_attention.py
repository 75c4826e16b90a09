"""A landmark token stands for each block, so that attention itself retrieves blocks."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="landmark-attention",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    authors="Mohtashami, Jaggi",
    year=2023,
    venue="NeurIPS 2023",
    arxiv="2305.16300",
    repository="epfml/landmark-attention",
    area="attention",
    missing="planned",
)
