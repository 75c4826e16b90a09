"""Cross-attention to high-response regions and between image pairs, for fine-grained recognition."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="dual-cross-attention",
    title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    authors="Zhu, Ke, Li, Liu, Tian, Shan",
    year=2022,
    venue="CVPR 2022",
    arxiv="2205.02151",
    area="attention",
    missing="planned",
)
