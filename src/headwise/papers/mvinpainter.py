"""Inpainting consistent over views, from 2D priors."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="mvinpainter",
    title="MVInpainter: Learning Multi-View Consistent Inpainting to Bridge 2D and 3D Editing",
    authors="Cao et al.",
    year=2024,
    venue="NeurIPS 2024",
    arxiv="2408.08000",
    repository="ewrfcas/MVInpainter",
    area="models",
    missing="planned",
)
