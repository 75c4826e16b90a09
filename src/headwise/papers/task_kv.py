"""Cache budgets per head by semantic distance."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="task-kv",
    title="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    authors="He, Liu, Chen",
    year=2025,
    arxiv="2501.15113",
    area="memory",
    missing="planned",
)
