"""What attention_calibration.py measures on: the shipped models with prompts whose answers are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.heads.knockout import live_heads
from headwise.hf.addresses import layout
from headwise.papers.running import Run
from headwise.specimens.prompts import backcopy_prompts, prose_prompts, symbol_prompts
from headwise.specimens.registry import load_specimen
from headwise.specimens.vision_language import vision_language_inputs
from headwise.steering.attention_calibration import AttentionCalibration
from headwise.tasks.captions import shapes_captions
from headwise.tasks.prompted import PromptBatch

# Prompts of a task, of prose (the longest ones); on one half heads are chosen, on the other the choice is measured.
PROMPTS, PROSE = 256, 128
BETA, THRESHOLD, RELATIVE = 0.4, 0.1, 5.0
SEEN_BY = 16  # rows that must see a token for it to count as a sink, so that a glance back at one word is none


@dataclass
class Task:
    """A model, a kind of prompt, which heads do anything; prompts to choose heads on, others to measure on.

    whole: whether an answer is right only as a whole; otherwise each of its tokens is an answer. pictures: what the
    prompts show, one for each, calibration first; None for text alone.
    """

    name: str
    model: nn.Module
    calibration: PromptBatch
    held_out: PromptBatch
    heads: list[Head]
    whole: bool = False
    pictures: Tensor | None = None

    @classmethod
    def of(
        cls, name: str, model: nn.Module, batch: PromptBatch, *, whole: bool = False, pictures: Tensor | None = None
    ) -> "Task":
        heads = layout(model).heads() if pictures is not None else live_heads(model, batch.input_ids[:8])
        half = len(batch) // 2
        return cls(name, model, batch.part(slice(half)), batch.part(slice(half, None)), heads, whole, pictures)

    def accuracy(self, batch: PromptBatch) -> Callable[[], Tensor]:
        """Share of each prompt's answers that are right."""
        return self.score(batch, PromptBatch.right if self.whole else share_right)

    def inputs(self, batch: PromptBatch) -> dict[str, Any]:
        given = batch.inputs()
        if self.pictures is not None:
            start = 0 if batch is self.calibration else len(self.calibration)
            given["pixel_values"] = self.pictures[start : start + len(batch)]
        return given

    def score(self, batch: PromptBatch, what: Callable[[PromptBatch, Tensor], Tensor]) -> Callable[[], Tensor]:
        """A number for every prompt, from the model as it is when asked."""
        return lambda: what(batch, self.model(**self.inputs(batch)).logits).float()


def share_right(batch: PromptBatch, logits: Tensor) -> Tensor:
    """The share of the tokens that are asked for which the model finds most likely."""
    r = logits.shape[1]
    asked, targets = batch.asked[:, -r + 1 :], batch.input_ids[:, -r + 1 :]
    return ((logits[:, :-1].argmax(-1) == targets) & asked).sum(1) / asked.sum(1)


def act(heads: Sequence[Head] | str | None = None, **options: Any) -> AttentionCalibration:
    """The paper's edit, each row judged by the rows up to itself: an answer must not help to find sinks."""
    chosen = {"beta": BETA, "threshold": THRESHOLD, "statistics": "running", **options}
    return AttentionCalibration(heads=heads, **chosen)


def tasks(run: Run) -> list[Task]:
    """Four models on five tasks, of which each is answered in part."""
    words = symbol_prompts(PROMPTS, run.seed, needle_size=9, tasks=("needles",))["needles"]
    prose = load_specimen("text")
    told = prose_prompts(prose.tokenizer, PROSE, run.seed, length=80)
    return [
        Task.of("needles", load_specimen("tasks").model, words, whole=True),
        Task.of("prose", prose.model, told, whole=True),
        Task.of("backcopy", load_specimen("backcopy-deep").model, backcopy_prompts(PROMPTS, run.seed)),
        *pictures(PROMPTS, run.seed),
    ]


def pictures(count: int, seed: int) -> list[Task]:
    """Pictures in which the typical shape never follows: the second to fourth word of the caption, and yes or no."""
    model = load_specimen("vision-language").model
    generator = torch.Generator().manual_seed(seed)
    scenes = shapes_captions(count, counterfactual=True, generator=generator)
    told = vision_language_inputs(scenes, [f"describe : {caption}" for caption in scenes.captions()])
    back = told["input_ids"].shape[1] - 1 - torch.arange(told["input_ids"].shape[1])  # tokens that follow
    shapes = (back % 2 == 0) & (back < 6)
    # Half of the questions are about a shape that is there, half about the one that usually would be.
    there, absent = scenes.questions(None, generator), scenes.questions("adversarial", generator)
    ask = [(there if i % 2 else absent).texts()[i] + (" yes" if i % 2 else " no") for i in range(count)]
    asked = vision_language_inputs(scenes, ask)
    return [
        Task.of(
            name,
            model,
            PromptBatch(name, given["input_ids"], given["attention_mask"].bool(), where.expand(count, -1)),
            pictures=given["pixel_values"],
        )
        for name, given, where in (("captions", told, shapes), ("questions", asked, _last(asked["input_ids"])))
    ]


def _last(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]) == ids.shape[1] - 1
