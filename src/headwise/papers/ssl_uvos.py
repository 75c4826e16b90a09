"""Objects in video from the attention of a self-supervised transformer."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="ssl-uvos",
    title=("Betrayed by Attention: A Simple yet Effective Approach for Self-supervised Video Object Segmentation"),
    authors="Ding, Qian, Xu, Lin, Xiong",
    year=2024,
    venue="ECCV 2024",
    arxiv="2311.17893",
    repository="shvdiwnkozbw/SSL-UVOS",
    area="heads",
    missing="planned",
)
