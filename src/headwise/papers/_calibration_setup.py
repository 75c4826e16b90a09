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
from headwise.steering.attention_calibration import AttentionCalibration
from headwise.tasks.prompted import PromptBatch

# Prompts of each task on which heads are chosen, and others on which the choice is measured.
CALIBRATION, HELD_OUT = 128, 128
BETA, THRESHOLD = 0.4, 0.1
SEEN_BY = 16  # rows that must see a token for it to count as a sink, so that a glance back at one word is none


@dataclass
class Task:
    """A model, a kind of prompt, which heads do anything; prompts to choose heads on, others to measure on.

    pictures: what the prompts show, one for each, calibration first; None for text alone.
    """

    name: str
    model: nn.Module
    calibration: PromptBatch
    held_out: PromptBatch
    heads: list[Head]
    pictures: Tensor | None = None

    @classmethod
    def of(cls, name: str, model: nn.Module, batch: PromptBatch, pictures: Tensor | None = None) -> "Task":
        heads = layout(model).heads() if pictures is not None else live_heads(model, batch.input_ids[:8])
        return cls(
            name, model, batch.part(slice(CALIBRATION)), batch.part(slice(CALIBRATION, None)), heads, pictures
        )

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
    """Accuracy of each prompt: the share of its answers' tokens that the model finds most likely."""
    r = logits.shape[1]
    asked, targets = batch.asked[:, -r + 1 :], batch.input_ids[:, -r + 1 :]
    return ((logits[:, :-1].argmax(-1) == targets) & asked).sum(1) / asked.sum(1)


def act(heads: Sequence[Head] | str | None = None, **options: Any) -> AttentionCalibration:
    """The edit as the paper sets it, each row judged by the rows up to itself: an answer must not help to find sinks."""
    chosen = {"beta": BETA, "threshold": THRESHOLD, "statistics": "running", **options}
    return AttentionCalibration(heads=heads, **chosen)


def tasks(run: Run) -> list[Task]:
    count = CALIBRATION + HELD_OUT
    symbols = load_specimen("tasks").model
    words = symbol_prompts(count, run.seed, needle_size=8, tasks=("needles", "multiple_choice", "addition"))
    prose, deep = load_specimen("text"), load_specimen("backcopy-deep").model
    found = [Task.of(name.replace("_", " "), symbols, batch) for name, batch in words.items()]
    found.append(Task.of("prose", prose.model, prose_prompts(prose.tokenizer, count, run.seed, length=112)))
    found.append(Task.of("backcopy", deep, backcopy_prompts(count, run.seed)))
    return found + [pictures(name, count, run.seed) for name in ("vision-language", "vision-language-noisy")]
