"""Attention weights that depend on positions only, for algorithms."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="positional-attention",
    title="Positional Attention: Expressivity and Learnability of Algorithmic Computation",
    authors="Back de Luca, Giapitzakis, Yang, Veličković, Fountoulakis",
    year=2025,
    venue="ICML 2025, PMLR 267:2335-2390",
    arxiv="2410.01686",
    repository="opallab/positional_attention",
    area="attention",
    missing="planned",
)
