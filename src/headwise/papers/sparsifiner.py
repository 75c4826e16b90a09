"""A learned, instance-dependent sparse attention mask."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="sparsifiner",
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    authors="Wei, Duke, Jiang, Aarabi, Taylor, Shkurti",
    year=2023,
    venue="CVPR 2023, pp. 22680-22689",
    arxiv="2303.13755",
    repository="lim142857/Sparsifiner",
    area="attention",
    missing="planned",
)
