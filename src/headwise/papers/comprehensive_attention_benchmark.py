"""A benchmark of attention over four patterns: noncausal and causal, self and cross."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="comprehensive-attention-benchmark",
    title="CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling",
    authors="Zhang, Jiang, Feng, Zheng, Kong",
    year=2023,
    venue="ICML 2023",
    arxiv="2210.07661",
    repository="Shark-NLP/CAB",
    area="attention",
    missing="planned",
)
