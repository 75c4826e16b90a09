"""A language model's own attention decides where to look closer in a large 3D scene."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="lscenellm",
    title="LSceneLLM: Enhancing Large 3D Scene Understanding Using Adaptive Visual Preferences",
    authors="Zhi et al.",
    year=2025,
    venue="CVPR 2025",
    arxiv="2412.01292",
    repository="Hoyyyaard/LSceneLLM",
    area="models",
    missing="planned",
)
