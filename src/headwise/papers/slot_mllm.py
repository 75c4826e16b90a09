"""Slots as visual tokens of a multimodal language model."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="slot-mllm",
    title="Slot-MLLM: Object-Centric Visual Tokenization for Multimodal LLM",
    authors="Chi, Kim, Oh, Kim, Lee, Jo, Kim, Baek, Ahn, Kim",
    year=2025,
    arxiv="2505.17726",
    repository="KU-AGI/Slot-MLLM",
    area="slots",
    missing="planned",
)
