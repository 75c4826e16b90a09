"""Intents and slots found without a schema."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="intent-slot-induction",
    title="Automatic Intent-Slot Induction for Dialogue Systems",
    authors="Zeng, Ma, Yang, Gou, Shen",
    year=2021,
    venue="WWW 2021",
    arxiv="2103.08886",
    area="tasks",
    missing="planned",
)
