"""Linear attention with decay, and the TransNormer network around it."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="lightning-attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    authors="Qin, Sun, Li, Shen, Sun, Zhong",
    year=2024,
    venue="ICML 2024",
    arxiv="2405.17381",
    repository="OpenNLPLab/TransnormerLLM",
    area="attention",
    missing="planned",
)
