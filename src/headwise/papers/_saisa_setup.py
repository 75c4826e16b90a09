"""What saisa.py trains: LLaVA, NAAViT and SAISA of one size from one start, on naming shapes and on comparing them.

Naming takes one place of the picture for each word. "Which shape occurs twice" takes all four places at once: that is
where image tokens that look at each other could be of use.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.models.conversion import convert
from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
from headwise.papers.running import Run
from headwise.tasks.captions import SHAPE_WORDS, CaptionedShapes, shapes_captions
from headwise.training import OptimiserSpec, fit, warmup_cosine

LLAVA, NAAVIT, SAISA = "LLaVA", "NAAViT", "SAISA"
ARMS = {LLAVA: "embedding", NAAVIT: "naavit", SAISA: "saisa"}
UNTRAINED = "NAAViT put into the trained LLaVA"
BLIND = "LLaVA, another picture"
NAMING, TWICE = "naming", "which occurs twice"

STEPS, BATCH, RATE, WARM_UP = 600, 64, 2e-3, 50
SIGMA = 1.2
TESTED = 1024
IMAGE_TOKENS, TEXT_TOKENS = 16, 10
PAD, BOS, EOS, IMAGE, COMMA, DESCRIBE, ASK_TWICE, FIRST_SHAPE = range(8)
VOCABULARY = FIRST_SHAPE + len(SHAPE_WORDS)


def sizes(alignment: str = "embedding") -> SaisaConfig:
    """The small network: a CLIP tower of two layers and a Llama of four, 64 wide."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    return SaisaConfig(
        alignment,
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )


def networks(seed: int) -> dict[str, Any]:
    """The arms, all from the same weights; SAISA's projectors start as copies of the one that the others have."""
    torch.manual_seed(seed)
    llava = SaisaForConditionalGeneration(sizes())
    return {name: llava if name == LLAVA else convert(copy.deepcopy(llava), to=ARMS[name]) for name in ARMS}


def twice_scenes(n: int, generator: torch.Generator) -> tuple[CaptionedShapes, Tensor]:
    """Pictures in which one shape occurs twice and two others once, and the number of the first."""
    kept: list[CaptionedShapes] = []
    while sum(map(len, kept)) < n:  # about half of the pictures are such
        drawn = shapes_captions(2 * n, sigma=SIGMA, prior=0.0, generator=generator)
        kept.append(drawn[drawn.present.sum(1) == 3])
    image, shapes, cells = (
        torch.cat([getattr(one, name) for one in kept])[:n] for name in ("image", "shapes", "cells")
    )
    counts = torch.nn.functional.one_hot(shapes, len(SHAPE_WORDS)).sum(1)
    return CaptionedShapes(image, shapes, cells), counts.argmax(1)


def naming_ids(scenes: CaptionedShapes) -> Tensor:
    """`<bos>`, the image tokens, "describe", then the shapes with commas between them and `<eos>`."""
    n, k = scenes.shapes.shape
    said = torch.full((n, 2 * k), COMMA)
    said[:, ::2], said[:, -1] = scenes.shapes + FIRST_SHAPE, EOS
    return torch.cat([_start(n, DESCRIBE), said], 1)


def twice_ids(answer: Tensor) -> Tensor:
    """`<bos>`, the image tokens, "twice", then the shape."""
    return torch.cat([_start(len(answer), ASK_TWICE), answer[:, None] + FIRST_SHAPE], 1)


def _start(n: int, word: int) -> Tensor:
    return torch.tensor([BOS, *[IMAGE] * IMAGE_TOKENS, word]).expand(n, -1)


def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and pixels of one step: the tasks take turns."""
    if step % 2 == 0:
        scenes = shapes_captions(BATCH, sigma=SIGMA, generator=generator)
        return naming_ids(scenes), scenes.pixel_values
    scenes, answer = twice_scenes(BATCH, generator)
    return twice_ids(answer), scenes.pixel_values


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the words behind the prompt."""
    ids, pixels = batch
    labels = ids.clone()
    labels[:, : 2 + IMAGE_TOKENS] = -100
    return model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss


@dataclass(frozen=True)
class Tests:
    """Held-out pictures: ordinary and counterfactual ones to name, and those with a shape that occurs twice."""

    naming: CaptionedShapes
    counterfactual: CaptionedShapes
    twice: CaptionedShapes
    answer: Tensor


def tests(seed: int, n: int = TESTED) -> Tests:
    generator = torch.Generator().manual_seed(10_000 + seed)
    naming = shapes_captions(n, sigma=SIGMA, generator=generator)
    counterfactual = shapes_captions(n, sigma=SIGMA, counterfactual=True, generator=generator)
    return Tests(naming, counterfactual, *twice_scenes(n, generator))


@torch.no_grad()
def right(model: Any, ids: Tensor, pixels: Tensor, columns: list[int]) -> Tensor:
    """`[n k]` which of the words at some columns a model says, given all that stand before."""
    found = []
    for part in range(0, len(ids), 256):
        some = slice(part, part + 256)
        logits = model(input_ids=ids[some], pixel_values=pixels[some], use_cache=False).logits
        found.append(logits[:, [column - 1 for column in columns]].argmax(-1) == ids[some][:, columns])
    return torch.cat(found)


def scores(model: Any, held: Tests, *, other_picture: bool = False) -> dict[str, float]:
    """Accuracy on each task, and of the first word alone, of which no other word says anything.

    other_picture: show the next sample's picture instead.
    """
    model.eval()
    start = 2 + IMAGE_TOKENS
    pixels = lambda scenes: scenes.pixel_values.roll(1, 0) if other_picture else scenes.pixel_values  # noqa: E731
    made = {}
    for name, scenes in ((NAMING, held.naming), ("naming, counterfactual", held.counterfactual)):
        found = right(model, naming_ids(scenes), pixels(scenes), [start, start + 2, start + 4, start + 6]).float()
        made[name] = float(found.mean())
        if name == NAMING:
            made["naming, first word"] = float(found[:, 0].mean())
    made[TWICE] = float(right(model, twice_ids(held.answer), pixels(held.twice), [start]).float().mean())
    return made


@dataclass
class Trained:
    """Networks, what each gets right, and the processor seconds of one training step."""

    models: Mapping[str, Any]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, arm: str) -> float:
        """Of the two tasks."""
        return (self.scores[arm][NAMING] + self.scores[arm][TWICE]) / 2


def train(model: Any, seed: int, steps: int = STEPS) -> Any:
    rule, schedule = OptimiserSpec(lr=RATE, betas=(0.9, 0.98)), warmup_cosine(WARM_UP)
    return fit(model, batches, loss, steps=steps, seed=seed, optimiser=rule, schedule=schedule)


def train_all(run: Run, steps: int = STEPS) -> Trained:
    made, held = Trained(networks(run.seed)), tests(run.seed)
    for name, model in made.models.items():
        run.log(f"training {name}")
        history = train(model, run.seed, steps)
        made.seconds[name] = history.cpu_seconds / steps
        made.curves[name] = history.losses
        made.scores[name] = scores(model, held)
        run.log(f"{name}: {made.scores[name]}, {made.seconds[name] * 1000:.0f} ms a step")
    made.scores[UNTRAINED] = scores(convert(copy.deepcopy(made.models[LLAVA]), to="naavit"), held)
    made.scores[BLIND] = scores(made.models[LLAVA], held, other_picture=True)
    return made
