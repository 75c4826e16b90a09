"""How robust slot filling is to noisy input."""

from headwise.papers.record import Paper

PAPER = Paper(
    slug="noisy-slot-filling",
    title=(
        "Revisit Input Perturbation Problems for LLMs: A Unified Robustness Evaluation Framework for Noisy "
        "Slot Filling Task"
    ),
    authors="Dong, Zhao, Hui, Guo, Wang et al.",
    year=2023,
    venue="NLPCC 2023, pp. 682-694",
    arxiv="2310.06504",
    repository="dongguanting/Noise-Slot-Filling-LLM",
    area="tasks",
    missing="planned",
)
