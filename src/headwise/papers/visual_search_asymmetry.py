"""Visual search with pooling that grows with eccentricity."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="visual-search-asymmetry",
    title="Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases",
    authors="Gupta, Zhang, Wu, Wolfe, Kreiman",
    year=2021,
    venue="NeurIPS 2021",
    arxiv="2106.02953",
    repository="kreimanlab/VisualSearchAsymmetry",
    area="models",
    missing="planned",
)
