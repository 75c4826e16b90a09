"""No attention among visual tokens, and visual features aligned with the attention inputs."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="saisa",
    title="SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency",
    authors="Yuan, Liu, Lu, Lin, He, Han, Sun",
    year=2025,
    arxiv="2502.02458",
    repository="icip-cas/SAISA",
    area="models",
    missing="planned",
)
