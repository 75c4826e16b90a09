"""What each head does at the last token of a multiple-choice question, by thresholds that are printed with the result.

    correct letter    attends to the label of the right option, more than to each wrong one
    single letter     attends to the label of one index, whatever is right
    uniform           attends to all labels alike
    content gatherer  attends to the texts of options, most to the right one's
    amplification     attends to the last tokens and pushes the label that the stream already favours there

"Right" means the gold option and, on prompts that the model gets wrong, its own answer: a head that looks at the gold
label where the model then says another is not what decides. Both figures are kept.

Paper: headwise/papers/multiple_choice_circuit.py (Lieberum et al., 2023).
"""

from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.heads.attribution import logit_attribution, logit_lens
from headwise.heads.decoding import arguments, embedding_device
from headwise.heads.masses import group_mass
from headwise.hf.addresses import layout
from headwise.tasks.choice_questions import ChoicePrompts

__all__ = ["CATEGORIES", "CategoryThresholds", "ChoiceHeads", "categorize_heads"]

CATEGORIES = ("correct letter", "single letter", "uniform", "content gatherer", "amplification", "none")


@dataclass(frozen=True)
class CategoryThresholds:
    """The bounds of the categories; `str` prints them.

    ratio: mass on the right label over the mean mass on a wrong one, at least. on_labels: mass on all labels together,
    at least. even: mass on the most attended index over the least, at most. single: share of the mass on labels that
    goes to one index, at least. on_text: mass on all texts, at least. on_last: mass on the last two tokens, at least.
    pushes: correlation of what the head writes to the labels' logits with what they hold before its layer, at least.
    prompts: so many prompts that the model gets wrong are needed to judge by them.
    """

    ratio: float = 3.0
    on_labels: float = 0.1
    even: float = 2.0
    single: float = 0.6
    on_text: float = 0.3
    on_last: float = 0.5
    pushes: float = 0.5
    prompts: int = 8

    def __post_init__(self) -> None:
        for part in fields(self):
            if not getattr(self, part.name) > 0:
                raise ValueError(f"CategoryThresholds: {part.name} is {getattr(self, part.name)}; it must be above 0")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class ChoiceHeads:
    """Figures and categories of all heads, `[l, h]` each.

    right, wrong: mean mass on the right label and on each wrong one, over prompts that the model answers right.
    missed: the ratio of the two where it errs, for its own answer; gold: there for the gold option; both nan where it
    errs too seldom. by_index: `[n, l, h]` mean mass on the label of each index over prompts with every right option
    alike. on_text, on_right_text, on_last: masses. pushes: correlation as in the thresholds. accuracy: among the labels
    on offer. erred: prompts answered wrong.
    """

    categories: dict[Head, str]
    thresholds: CategoryThresholds
    right: Float[Tensor, "l h"]
    wrong: Float[Tensor, "l h"]
    missed: Float[Tensor, "l h"]
    gold: Float[Tensor, "l h"]
    by_index: Float[Tensor, "n l h"]
    on_text: Float[Tensor, "l h"]
    on_right_text: Float[Tensor, "l h"]
    on_last: Float[Tensor, "l h"]
    pushes: Float[Tensor, "l h"]
    accuracy: float
    erred: int

    def of(self, category: str) -> list[Head]:
        """Heads of a category, by mass on the right label, highest first. Raises ValueError for an unknown one."""
        if category not in CATEGORIES:
            raise ValueError(f"ChoiceHeads: category is {category!r}; choose from {', '.join(CATEGORIES)}")
        found = [head for head, name in self.categories.items() if name == category]
        return sorted(found, key=lambda head: (-float(self.right[head.layer, head.head]), head))

    def ratio(self) -> Float[Tensor, "l h"]:
        """Mass on the right label over the mean mass on a wrong one."""
        return self.right / self.wrong.clamp_min(1e-12)

    def map(self, model: nn.Module) -> HeadMap:
        """Mass on the right label and its ratio, as a head map."""
        tables = {"right-label": self.right, "label-ratio": self.ratio()}
        scores = {
            name: {head: float(table[head.layer, head.head]) for head in self.categories}
            for name, table in tables.items()
        }
        return HeadMap(scores, layout(model), source="categorize_heads")

    def __str__(self) -> str:
        lines = [f"thresholds: {self.thresholds}"]
        for name in CATEGORIES[:-1]:
            if heads := self.of(name):
                lines.append(f"{name}: {', '.join(map(str, heads))}")
        return "\n".join(lines)


@torch.no_grad()
def categorize_heads(
    model: nn.Module, prompts: ChoicePrompts, thresholds: CategoryThresholds | None = None
) -> ChoiceHeads:
    """Sort the heads of a decoder by what they look at where it answers.

    Prompts should ask for every index about equally often. `single letter` is asked first, then the others in the order
    of `CATEGORIES`: in a model that always says one letter, the head behind it looks at the right label wherever the
    answer is right.

    Raises ValueError where all prompts have one right option and where the model answers none of them right,
    UnsupportedModel where logits cannot be attributed.
    """
    limits = CategoryThresholds() if thresholds is None else thresholds
    device = embedding_device(model)
    given = arguments(model, prompts.input_ids.to(device), prompts.real.to(device))
    if len(prompts.right.unique()) < 2:
        raise ValueError(
            f"categorize_heads: in all {len(prompts)} prompts option {int(prompts.right[0])} is right; ask for others "
            "as well, or heads that always look there pass for heads that find the right one"
        )
    said = prompts.chosen(model(**given).logits[:, -1])
    correct = said == prompts.right
    if not bool(correct.any()):
        raise ValueError(
            f"categorize_heads: the model answers none of {len(prompts)} prompts right; there is no correct letter to "
            "look for"
        )
    inputs = prompts.inputs()
    masses = group_mass(model, inputs, prompts.groups())
    n = prompts.labels.shape[1]
    right, wrong = masses["right-label"][correct].mean(0), masses["wrong-labels"][correct].mean(0) / (n - 1)
    missed = gold = torch.full_like(right, torch.nan)
    erred = int((~correct).sum())
    if erred >= limits.prompts:
        own = group_mass(model, inputs, prompts.groups(said))
        missed = _ratio(own["right-label"], own["wrong-labels"], n, ~correct)
        gold = _ratio(masses["right-label"], masses["wrong-labels"], n, ~correct)
    by_right = [prompts.right == i for i in prompts.right.unique()]
    by_index = torch.stack(
        [torch.stack([masses[f"label-{i}"][chosen].mean(0) for chosen in by_right]).mean(0) for i in range(n)]
    )
    pushes = _pushes(model, prompts, inputs)
    found = ChoiceHeads(
        {},
        limits,
        right,
        wrong,
        missed,
        gold,
        by_index,
        (masses["right-text"] + masses["wrong-texts"]).mean(0),
        masses["right-text"][correct].mean(0),
        masses["last"].mean(0),
        pushes,
        float(correct.double().mean()),
        erred,
    )
    for head in layout(model).heads():
        found.categories[head] = _category(found, head)
    return found


def _ratio(right: Tensor, wrong: Tensor, n: int, rows: Bool[Tensor, " b"]) -> Float[Tensor, "l h"]:
    return right[rows].mean(0) / (wrong[rows].mean(0) / (n - 1)).clamp_min(1e-12)


def _pushes(model: nn.Module, prompts: ChoicePrompts, inputs: dict[str, Tensor]) -> Float[Tensor, "l h"]:
    """Over prompts and labels, centred: what heads write to the labels' logits against what stood there before."""

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    wrote = centred(logit_attribution(model, inputs, prompts.labels).heads.double())  # b l h n
    stood = centred(logit_lens(model, inputs, prompts.labels)[:, :-1].double())[:, :, None]  # b l 1 n
    product = (wrote * stood).sum((0, 3))
    size = (wrote.square().sum((0, 3)) * stood.square().sum((0, 3))).sqrt()
    return (product / size.clamp_min(1e-12)).float()


def _category(found: ChoiceHeads, head: Head) -> str:
    limits, at = found.thresholds, (head.layer, head.head)
    n = len(found.by_index)
    on_labels = float(found.by_index[:, *at].sum())
    share = found.by_index[:, *at] / max(on_labels, 1e-12)
    if on_labels >= limits.on_labels:
        follows = bool(found.missed[at].isnan()) or float(found.missed[at]) >= limits.ratio
        if float(share.max()) >= max(limits.single, 1.5 / n):
            return "single letter"
        if float(found.ratio()[at]) >= limits.ratio and follows:
            return "correct letter"
        if float(share.max()) <= limits.even * float(share.min()) and float(found.ratio()[at]) < limits.even:
            return "uniform"
    texts = float(found.on_text[at])
    if texts >= limits.on_text and float(found.on_right_text[at]) * n >= limits.even * texts:
        return "content gatherer"
    if float(found.on_last[at]) >= limits.on_last and float(found.pushes[at]) >= limits.pushes:
        return "amplification"
    return "none"
