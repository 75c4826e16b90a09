"""A few agent tokens broker between queries and keys, in linear time."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="agent-attention",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    authors="Han, Ye, Han, Xia, Pan, Wan, Song, Huang",
    year=2024,
    venue="ECCV 2024",
    arxiv="2312.08874",
    repository="LeapLabTHU/Agent-Attention",
    area="attention",
    missing="planned",
)
