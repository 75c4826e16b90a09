"""What multiple_choice_circuit.py measures on: questions in four labellings, the heads that answer them, and what is
left of the answers when these heads lose outputs or directions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.edit import Edit
from headwise.attend.edits import Ablate
from headwise.attend.groups import positions
from headwise.heads.categories import ChoiceHeads, categorize_heads
from headwise.heads.effects import Node, NodeEffects, centred_logit
from headwise.heads.knockout import live_heads
from headwise.heads.patching import activation_patch, path_patch
from headwise.heads.subspaces import Subspace, at_places, head_vectors, label_pattern, subspace
from headwise.hf.addresses import layout
from headwise.hf.maps import head_outputs
from headwise.hf.session import steer
from headwise.papers.running import Run
from headwise.specimens.registry import load_specimen
from headwise.tasks.choice_questions import ChoicePrompts, choice_prompts

LABELLINGS = ("standard", "random", "permuted", "digits")
PROMPTS, OPTIONS = 256, 4
RANKS = (0, 1, 2, 3, 4, 8, 16)
DRAWS = 20


@dataclass
class Questions:
    """Questions of one labelling: those that heads and subspaces are found on, those that are held out, others to
    take outputs from. The first two ask for the options in turn, the others for any."""

    found: ChoicePrompts
    held: ChoicePrompts
    other: ChoicePrompts


@dataclass
class Study:
    """The model, its questions, and its heads."""

    model: nn.Module
    layout: Layout
    seed: int
    asked: dict[str, Questions]
    heads: dict[str, ChoiceHeads]
    live: list[Head]
    letters: list[Head]
    _spaces: dict[tuple[str, str, bool], dict[Head, Subspace]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> "Study":
        """Prompts of the run's seed, and the correct letter heads on standard labels, by mass on the right label."""
        model = load_specimen("choices").model.to(run.device)
        generator = torch.Generator().manual_seed(1000 + run.seed)
        right = torch.arange(PROMPTS) % OPTIONS

        def draw(labels: str, right: Tensor | None) -> ChoicePrompts:
            return choice_prompts(PROMPTS, labels=labels, right=right, generator=generator)[0]

        asked = {
            labels: Questions(draw(labels, right), draw(labels, right), draw(labels, None)) for labels in LABELLINGS
        }
        heads = {labels: categorize_heads(model, asked[labels].found) for labels in LABELLINGS}
        for labels, found in heads.items():
            run.log(f"{labels} labels: {found}".replace("\n", "; "))
        live = live_heads(model, asked["standard"].found.input_ids)
        letters = heads["standard"].of("correct letter")
        if not letters:  # the rows then fail by what this head does
            ratio = heads["standard"].right
            letters = [max(live, key=lambda head: float(ratio[head.layer, head.head]))]
        return cls(model, layout(model), run.seed, asked, heads, live, letters)

    def pool(self, layers: Sequence[int]) -> list[Head]:
        """Live heads of some layers that are not among the letter heads."""
        return [head for head in self.live if head.layer in layers and head not in self.letters]

    def says(self, prompts: ChoicePrompts, *edits: Edit) -> Float[Tensor, "b v"]:
        """Logits of the answers under edits."""
        device = next(self.model.parameters()).device
        with torch.no_grad(), steer(self.model, *edits):
            return self.model(**{name: x.to(device) for name, x in prompts.inputs().items()}).logits[:, -1].cpu()

    def right(self, prompts: ChoicePrompts, *edits: Edit, figure: str = "labels") -> float:
        """Accuracy among the labels on offer, or another figure of `ChoicePrompts.accuracy`."""
        return prompts.accuracy(self.says(prompts, *edits))[figure]

    def without(self, heads: Sequence[Head], labels: str) -> float:
        """The same with the outputs of heads taken from other questions."""
        asked = self.asked[labels]
        taken = head_outputs(self.model, asked.other.input_ids)
        return self.right(asked.held, Ablate(list(heads), mode="resample", statistics=taken))

    def spaces(self, labels: str, part: str, *, by_index: bool = False) -> dict[Head, Subspace]:
        """All directions of one part of every letter head, strongest first, found on the first questions."""
        if (labels, part, by_index) in self._spaces:
            return self._spaces[labels, part, by_index]
        asked = self.asked[labels].found
        places = torch.full((len(asked), 1), -1) if part == "q" else asked.label_at
        by = None
        if by_index:
            by = asked.right[:, None] if part == "q" else torch.arange(OPTIONS).expand(len(asked), -1)
        size = int(self.model.config.head_dim)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        found = {
            head: subspace(self.model, head, part, asked.input_ids, places, rank=size, by=by)  # pyright: ignore[reportArgumentType]
            for head in self.letters
        }
        self._spaces[labels, part, by_index] = found
        return found

    def projected(
        self,
        labels: str,
        parts: str,
        rank: int,
        *,
        by_index: bool = False,
        random: int | None = None,
        figure: str = "labels",
    ) -> float:
        """Accuracy on held-out questions with parts of the letter heads reduced to so many directions."""
        generator = None if random is None else torch.Generator().manual_seed(random)
        kept = [
            space.truncated(rank) for part in parts for space in self.spaces(labels, part, by_index=by_index).values()
        ]
        return self.reduced(labels, kept if generator is None else [one.random(generator) for one in kept], figure)

    def reduced(self, labels: str, spaces: Sequence[Subspace], figure: str = "labels") -> float:
        """The same with subspaces of one's own: of queries at the last token, of keys and values at the labels."""
        prompts = self.asked[labels].held
        last = torch.zeros_like(prompts.real)
        last[:, -1] = True
        at = {"q": positions(last), "k": positions(prompts.groups()["labels"])}
        edits = [space.edit(at["q" if space.part == "q" else "k"]) for space in spaces]
        return self.right(prompts, *edits, figure=figure)

    def vectors(self, labels: str, head: Head) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Queries of the last tokens and keys of the labels of one head, on the first questions, less their means (of
        all prompts, and of the prompt)."""
        prompts = self.asked[labels].found
        found = head_vectors(self.model, prompts.input_ids, head)
        q, k = found["q"][:, -1].double().cpu(), at_places(found["k"], prompts.label_at).double().cpu()
        return q - q.mean(0), k - k.mean(1, keepdim=True)

    def meeting(self, labels: str, rank: int) -> list[Subspace]:
        """For each letter head directions that are chosen for both: those of queries and of keys through which most of
        q . k passes, the strongest pairs of the two once whitened."""
        kept = []
        for head in self.letters:
            (q, k), spaces = self.vectors(labels, head), (self.spaces(labels, part)[head] for part in "qk")
            size = q.shape[-1]
            root = [
                torch.linalg.cholesky(x.mT @ x / len(x) + 1e-9 * torch.eye(size, dtype=x.dtype))
                for x in (q, k.flatten(0, 1))
            ]
            left, _, right = torch.linalg.svd(root[0].mT @ root[1])
            read = [root[1] @ right.mT[:, :rank], root[0] @ left[:, :rank]]  # what q and k are multiplied with
            for space, wanted in zip(spaces, read, strict=True):
                basis = torch.linalg.qr(wanted).Q.to(space.basis)
                kept.append(replace(space, basis=basis))
        return kept

    def patterns(self, labels: str, order: Int[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """Mass on the right label among the labels alone, mean over the letter heads; the query that meets the keys of
        prompt i is that of prompt `order[i]`. Over all prompts it is the same to say that the keys are moved."""
        prompts, total = self.asked[labels].held, torch.zeros(PROMPTS)
        order = torch.arange(PROMPTS) if order is None else order
        for head in self.letters:
            found = head_vectors(self.model, prompts.input_ids, head)
            q, k = found["q"][:, -1][order], at_places(found["k"], prompts.label_at)
            total += label_pattern(q, k).gather(1, prompts.right[:, None].to(q.device))[:, 0].cpu()
        return total / len(self.letters)

    def same_index(self, shift: int = 1) -> Int[Tensor, " b"]:
        """For every prompt another whose right option has the same index (prompts go round the options in turn)."""
        return (torch.arange(PROMPTS) + OPTIONS * shift) % PROMPTS

    def effects(self, labels: str, kind: str = "direct", held: bool = False) -> NodeEffects:
        """Of every live node, resampled from another question at the last token."""
        asked = self.asked[labels]
        clean = asked.held if held else asked.found
        metric = centred_logit(clean.answers, clean.labels)
        nodes: list[Node] = [*self.live, *(f"mlp:{layer}" for layer in range(self.layout.main.layers))]
        if kind == "total":
            return activation_patch(self.model, clean.input_ids, asked.other.input_ids, metric, nodes=nodes)
        return path_patch(
            self.model, clean.input_ids, asked.other.input_ids, metric, senders=nodes, freeze=("heads", "mlps", "norm")
        )


def nodes_of(effects: NodeEffects, live: Sequence[Head]) -> dict[Node, Float[Tensor, " b"]]:
    """Node -> its effect on every prompt."""
    assert effects.mlps is not None
    table: dict[Node, Tensor] = {head: effects.heads[:, head.layer, head.head] for head in live}
    return table | {f"mlp:{layer}": effects.mlps[:, layer] for layer in range(effects.mlps.shape[1])}


def kept(effects: NodeEffects, live: Sequence[Head], inside: Sequence[Node]) -> float:
    """Share of the metric that is left when all other nodes' direct paths are resampled: with the norm frozen, effects
    add up."""
    lost = sum(value for node, value in nodes_of(effects, live).items() if node not in set(inside))
    return float((effects.clean + lost).mean() / effects.clean.mean())


def output_set(study: Study, labels: str) -> list[Node]:
    """A quarter of the live nodes: those with the largest direct effects on the questions that heads are found on."""
    found = nodes_of(study.effects(labels), study.live)
    size = len(found) // 4
    return sorted(found, key=lambda node: -float(found[node].mean().abs()))[:size]
