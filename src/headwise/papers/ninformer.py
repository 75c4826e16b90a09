"""A token-mixing network generates the gate of another."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="ninformer",
    title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    authors="Abdullah, Aydin",
    year=2024,
    venue="Neural Computing and Applications, 2025",
    arxiv="2403.02411",
    repository="Abdullah-88/NiNformer",
    area="models",
    missing="planned",
)
