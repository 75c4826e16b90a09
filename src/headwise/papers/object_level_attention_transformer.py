"""Gaze over objects, predicted one fixation after the other."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="object-level-attention-transformer",
    title="OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
    authors="Fang, Yu, Zhang, van der Lans, Shi",
    year=2024,
    venue="ECCV 2024",
    repository="HKUST-NISL/oat_eccv24",
    area="models",
    missing="planned",
)
