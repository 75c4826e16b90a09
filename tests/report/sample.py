"""A report as a scan would make it, from attention drawn by hand: four layers of eight heads over a real paragraph."""

import re
from typing import Any

import torch
from torch import Tensor

from headwise.attend.addresses import Head, Layout
from headwise.attend.head_map import HeadMap
from headwise.report.html import sparse_rows
from headwise.report.suggestions import suggest

TEXT = """The lighthouse at Corran Point was kept by Ada Merrow, and after Ada Merrow by her brother Tobias. \
Tobias Merrow wrote everything down: the wind, the oil, the ships. "A ship you do not write down," said Tobias, \
"is a ship that was never there." When the *Halcyon* went past on the third of March without a light, Tobias wrote \
down the *Halcyon*, and the hour, and that the wind was from the north.

def ships(log):
    for line in log:
        if "ship" in line:
            yield line

Years later a clerk in Corran found the log. The clerk read that the wind was from the north, that the *Halcyon* \
had no light, and that Ada Merrow had once seen the same ship. Nobody else had written down the *Halcyon*."""

LAYOUT = Layout.of([8] * 4, [4] * 4)
KINDS = {  # what each planted head does; the rest look around without a plan
    (0, 1): "previous",
    (0, 4): "duplicate",
    (1, 6): "sink",
    (2, 2): "sink",
    (2, 5): "induction",
    (3, 0): "induction",
    (3, 3): "sink",
}
SENTENCES = {
    "sink": "How much of its attention the head parks on the first token.",
    "previous": "How much the head attends to the token just before.",
    "duplicate": "How much the head attends to earlier copies of the current token.",
    "induction": "How much the head attends to what followed earlier copies of the token: it continues patterns.",
    "entropy": "How widely the head looks: 0 is a single token, 1 is everything alike.",
}


def tokens(text: str = TEXT) -> list[str]:
    return ["<s>", *re.findall(r" ?[A-Za-z]{1,6}|\n+ *| ?[^A-Za-z\s]|\s", text)]


def planted(kind: str, words: list[str], strength: float, generator: torch.Generator) -> Tensor:
    """A causal attention matrix that does what `kind` says with `strength`, and looks around for the rest."""
    n = len(words)
    logits = torch.randn(n, n, generator=generator) - 0.02 * (torch.arange(n)[:, None] - torch.arange(n)).abs()
    target = torch.zeros(n, n)
    for t in range(n):
        earlier = [j for j in range(1, t) if words[j] == words[t]]
        if kind == "previous":
            target[t, max(t - 1, 0)] = 1
        elif kind == "duplicate" and earlier:
            target[t, earlier] = 1 / len(earlier)
        elif kind == "induction" and earlier:
            target[t, [j + 1 for j in earlier]] = 1 / len(earlier)
        else:
            target[t, 0] = 1
    background = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    return strength * target + (1 - strength) * background


def scores(weights: Tensor, words: list[str]) -> dict[str, float | None]:
    n, rows = len(words), torch.arange(1, len(words))
    copies = [(t, [j for j in range(1, t) if words[j] == words[t]]) for t in range(1, n)]
    copies = [(t, earlier) for t, earlier in copies if earlier]
    entropy = torch.special.entr(weights).sum(-1)[1:] / torch.log(rows + 1.0)
    return {
        "sink": weights[1:, 0].mean().item(),
        "previous": weights[rows, rows - 1].mean().item(),
        "duplicate": sum(weights[t, e].sum().item() for t, e in copies) / len(copies),
        "induction": sum(weights[t, [j + 1 for j in e]].sum().item() for t, e in copies) / len(copies),
        "entropy": entropy.mean().item(),
    }


def head_map(words: list[str], *, seed: int = 0, model: str = "text") -> tuple[HeadMap, dict[Head, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for head in LAYOUT.heads():
        kind = KINDS.get((head.layer, head.head))
        strength = 0.55 + 0.4 * torch.rand((), generator=generator).item() if kind else 0.0
        if kind is None and head.layer:
            kind, strength = "sink", 0.7 * torch.rand((), generator=generator).item()
        maps[head] = planted(kind or "none", words, strength, generator)
    table = {head: scores(weights, words) for head, weights in maps.items()}
    return HeadMap({probe: {h: table[h][probe] for h in maps} for probe in SENTENCES}, LAYOUT, model=model), maps


def report_data(text: str = TEXT, *, examples: int = 3, model: str = "text") -> dict[str, Any]:
    words = tokens(text)
    found, maps = head_map(words, model=model)
    return {
        "model": model,
        "source": f"headwise's own page, {len(words)} tokens",
        "towers": LAYOUT.to_json(),
        "probes": {
            probe: {
                "sentence": SENTENCES[probe],
                "scores": {str(head): score for head, score in found.of(probe).items()},
                "top": [str(head) for head in found.top(probe, 8)],
                "try": suggest(probe, model="" if model == "text" else model),
            }
            for probe in SENTENCES
        },
        "texts": [{"name": "A keeper's log", "tokens": words, "special": [0]}],
        "examples": [
            {"probe": probe, "head": str(head), "text": 0, "rows": sparse_rows(maps[head].float())}
            for probe in SENTENCES
            for head in found.top(probe, examples)
        ],
        "notes": ["All rows were read, row 0 and padding excluded.", "One window; nothing was left out."],
        "versions": {"torch": torch.__version__},
    }
