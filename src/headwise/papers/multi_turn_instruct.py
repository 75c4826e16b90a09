"""Following entangled instructions over several turns, and what attention shows about it."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="multi-turn-instruct",
    title="Can Language Models Follow Multiple Turns of Entangled Instructions?",
    authors="Han, Liu, Wang, Li, Yang et al.",
    year=2025,
    arxiv="2503.13222",
    repository="Glaciohound/Multi-Turn-Instruct",
    area="tasks",
    missing="planned",
)
