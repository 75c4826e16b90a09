"""The same heads serve different tasks; a circuit found on one mends another."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="circuit-component-reuse",
    title="Circuit Component Reuse Across Tasks in Transformer Language Models",
    authors="Merullo, Eickhoff, Pavlick",
    year=2024,
    venue="ICLR 2024",
    arxiv="2310.08744",
    repository="jmerullo/circuit_reuse",
    area="heads",
    missing="planned",
)
