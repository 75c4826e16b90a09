"""Which heads carry out arithmetic, and tuning only those."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="arithmetic-heads",
    title="Interpreting and Improving Large Language Models in Arithmetic Calculation",
    authors="Zhang, Wan, Zhang, Cheung, Tian, Shen, Ye",
    year=2024,
    venue="ICML 2024",
    arxiv="2409.01659",
    area="heads",
    missing="planned",
)
