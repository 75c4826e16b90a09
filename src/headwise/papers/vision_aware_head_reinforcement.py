"""Find the heads that depend on the image, and amplify them."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="vision-aware-head-reinforcement",
    title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
    authors="He, Zhu, Guo, Fang, Hua, Jia, Tang, Chua, Wang",
    year=2025,
    venue="ACL 2025",
    arxiv="2412.13949",
    repository="jinghan1he/VHR",
    area="steering",
    missing="planned",
)
