"""Finding a user interface element by a fast answer or a slow, staged one."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="focus-gui-grounding",
    title="Think Twice, Click Once: Enhancing GUI Grounding via Fast and Slow Systems",
    authors="Tang, Shen, Zhang, Chen, Hou, Zhang, Zhang, Song, Lu, Zhuang",
    year=2025,
    arxiv="2503.06470",
    repository="sugarandgugu/Focus",
    area="tasks",
    missing="planned",
)
