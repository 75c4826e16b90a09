"""Vision transformers that attend over space and over channels in turn."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="davit",
    title="DaViT: Dual Attention Vision Transformers",
    authors="Ding, Xiao, Codella, Luo, Wang, Yuan",
    year=2022,
    venue="ECCV 2022",
    arxiv="2204.03645",
    repository="dingmyu/davit",
    area="models",
    missing="planned",
)
