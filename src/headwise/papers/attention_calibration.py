"""Lower the sinks that hurt, per head, and give their mass to the other tokens."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="attention-calibration",
    title=(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training "
        "through Attention Calibration"
    ),
    authors="Yu, Wang et al.",
    year=2024,
    venue="ICML 2024",
    arxiv="2406.15765",
    repository="GATECH-EIC/ACT",
    area="steering",
    missing="planned",
)
