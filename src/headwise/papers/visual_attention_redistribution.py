"""Move attention from visual sinks to the image tokens that matter."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="visual-attention-redistribution",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    authors="Kang et al.",
    year=2025,
    venue="ICLR 2025",
    arxiv="2503.03321",
    repository="seilk/VisAttnSink",
    area="steering",
    missing="planned",
)
