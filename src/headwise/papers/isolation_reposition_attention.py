"""Several consistent subjects in generated images, by isolating and repositioning attention."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="isolation-reposition-attention",
    title=(
        "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention"
    ),
    authors="He, Wang, Zhou, Cai, Chao, Yin, Yang",
    year=2024,
    arxiv="2411.19261",
    repository="hehuiguo/DreamStory",
    area="steering",
    missing="planned",
)
