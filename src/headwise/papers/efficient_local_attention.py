"""Channel-wise attention along the height and the width of a feature map."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="efficient-local-attention",
    title="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
    authors="Xu, Wan",
    year=2024,
    arxiv="2403.01123",
    area="attention",
    missing="planned",
)
