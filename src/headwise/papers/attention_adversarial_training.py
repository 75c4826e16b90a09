"""Adversarial training on the attention scores themselves."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="attention-adversarial-training",
    title="Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training",
    authors="Kitada, Iyatomi",
    year=2021,
    venue="IEEE Access 9, pp. 92974-92985",
    arxiv="2009.12064",
    repository="shunk031/attention-meets-perturbation",
    area="steering",
    missing="planned",
)
