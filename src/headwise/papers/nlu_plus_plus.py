"""Multi-label intents and rich slots for banking and hotels."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="nlu-plus-plus",
    title=(
        "NLU++: A Multi-Label, Slot-Rich, Generalisable Dataset for Natural Language Understanding in "
        "Task-Oriented Dialogue"
    ),
    authors="Casanueva, Vulić, Spithourakis, Budzianowski",
    year=2022,
    venue="Findings of NAACL 2022",
    arxiv="2204.13021",
    repository="PolyAI-LDN/task-specific-datasets",
    area="tasks",
    missing="planned",
)
