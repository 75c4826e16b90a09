"""Attention weights from learned Gaussians over features."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="gaussian-adaptive-attention",
    title=("Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities"),
    authors="Ioannides, Chadha, Elkins",
    year=2024,
    arxiv="2401.11143",
    repository="gioannides/Gaussian-Adaptive-Attention",
    area="attention",
    missing="planned",
)
