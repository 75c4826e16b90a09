"""Linear attention in tiles: softmax-free, constant speed at any length."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="lightning-attention-2",
    title=("Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models"),
    authors="Qin, Sun, Li, Shen, Sun, Zhong",
    year=2024,
    arxiv="2401.04658",
    repository="OpenNLPLab/lightning-attention",
    area="attention",
    missing="planned",
)
