"""Heads that pick the letter of the right answer."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="multiple-choice-circuit",
    title=("Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla"),
    authors="Lieberum, Rahtz, Kramár, Nanda, Irving, Shah, Mikulik",
    year=2023,
    arxiv="2307.09458",
    area="heads",
    missing="planned",
)
