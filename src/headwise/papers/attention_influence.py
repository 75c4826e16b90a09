"""Choose pretraining data by how much a model without its retrieval heads suffers on it."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="attention-influence",
    title="AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection",
    authors="Hua, Wu, Zhang, Shen",
    year=2025,
    arxiv="2505.07293",
    area="heads",
    missing="planned",
)
