"""The model, pictures and ways of decoding of vision-aware head reinforcement; its rows are beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.edits import ScaleHeads
from headwise.attend.head_map import HeadMap
from headwise.heads.vision import ContextDivergence, vision_divergence
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import steer
from headwise.papers.running import Run
from headwise.specimens.vision_language import (
    DESCRIBE,
    EOS,
    PAD,
    WORDS,
    caption_batch,
    vision_language_inputs,
    vision_language_model,
)
from headwise.steering.vision_head_reinforcement import VisionAwareHeadReinforcement
from headwise.tasks.captions import SHAPE_WORDS, CaptionedShapes, shapes_captions

PICTURES, CALIBRATION, BATCH = 1024, 256, 256
DRAWS = 4  # random sets of heads for each picture
LAYERS = (1, 2, 3)
ALPHA = 2.0
SHAPES = slice(WORDS.index(SHAPE_WORDS[0]), WORDS.index(SHAPE_WORDS[0]) + len(SHAPE_WORDS))


@dataclass
class Subject:
    """A trained model and pictures that it never saw: ordinary and counterfactual ones, and some to choose heads on."""

    model: Any
    ordinary: CaptionedShapes
    other: CaptionedShapes
    calibration: CaptionedShapes
    memo: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


def subject(run: Run, pictures: int = PICTURES) -> Subject:
    """The specimen of the run's seed, and fresh pictures."""
    model = vision_language_model(run.seed, log=lambda record: run.log(f"training: step {record['step']}"))
    start = 500_000 + 10 * run.seed
    ordinary, other = (shapes_captions(pictures, counterfactual=flag, seed=start + flag) for flag in (False, True))
    return Subject(model, ordinary, other, shapes_captions(CALIBRATION, seed=start + 2))


@dataclass(frozen=True)
class Said:
    """What the model says next, the true caption so far being given: `[n, k]` shapes, and a mean over the pictures."""

    shapes: Tensor
    scenes: CaptionedShapes

    @property
    def typical(self) -> Tensor:
        """`[n]` share of the second to fourth words that are the typical successor and are not there."""
        return ((self.shapes == self.before) & (self.before != self.scenes.shapes))[:, 1:].float().mean(1)

    @property
    def right(self) -> Tensor:
        """`[n]` share of the second to fourth words that are right."""
        return (self.shapes == self.scenes.shapes)[:, 1:].float().mean(1)

    @property
    def before(self) -> Tensor:
        return self.scenes.typical.roll(1, 1)


Arm = Callable[[slice], Sequence[Edit]]


@torch.no_grad()
def told(model: Any, scenes: CaptionedShapes, arm: Arm | None = None) -> Said:
    """The next shapes under edits, which see the prompt end where it ends: the caption follows on the filled cache."""
    found = []
    for start in range(0, len(scenes), BATCH):
        part = slice(start, start + BATCH)
        some = scenes[part]
        inputs = vision_language_inputs(some)
        caption = caption_batch(some, True).ids[:, inputs["input_ids"].shape[1] : -2]
        with steer(model, *(arm(part) if arm is not None else ())):
            first = model(**inputs, use_cache=True)
            rest = model(input_ids=caption, **with_cache(model, cache_of(first)))
        logits = torch.cat([first.logits[:, -1:], rest.logits[:, 1::2]], 1)
        found.append(logits[..., SHAPES].argmax(-1))
    return Said(torch.cat(found), scenes)


@torch.no_grad()
def chosen_heads(model: Any, scenes: CaptionedShapes, *, drop_outliers: bool = True) -> Tensor:
    """`[n, l, h]` the heads that VHR chooses for each picture."""
    found = []
    for start in range(0, len(scenes), BATCH):
        edit = VisionAwareHeadReinforcement(ALPHA, drop_outliers=drop_outliers)
        with steer(model, edit):
            model(**vision_language_inputs(scenes[start : start + BATCH]))
        assert edit.chosen is not None
        found.append(edit.chosen)
    return torch.cat(found)


def scaled(chosen: Tensor, alpha: float = ALPHA) -> Arm:
    """The arm that scales these heads, `[n, l, h]`, or `[l, h]` for all pictures alike."""
    factor = torch.where(chosen, alpha, 1.0)
    return lambda part: (ScaleHeads(scale=factor[part] if factor.ndim == 3 else factor),)


def reinforced(alpha: float = ALPHA, **options: Any) -> Arm:
    """The arm of the paper."""
    return lambda part: (VisionAwareHeadReinforcement(alpha, **options),)


def divergence_map(one: Subject) -> HeadMap:
    """The mean VHD of each head over the calibration pictures."""

    def measure() -> HeadMap:
        return vision_divergence(one.model, vision_language_inputs(one.calibration)).map(one.model)

    return one.once("map", measure)


def random_heads(one: Subject, chosen: Tensor, seed: int) -> list[Tensor]:
    """For each picture `DRAWS` sets with as many heads in each layer as were chosen for it, drawn from all of them."""
    table = divergence_map(one)
    draws = [torch.zeros_like(chosen) for _ in range(DRAWS)]
    for number, row in enumerate(chosen):
        heads = [Head(int(layer), int(head)) for layer, head in row.nonzero()]
        sets = table.matched_random(heads, DRAWS, overlap=True, seed=seed * 100_000 + number)
        for draw, drawn in zip(draws, sets, strict=True):
            for head in drawn:
                draw[number, head.layer, head.head] = True
    return draws


def upper_half(one: Subject) -> Tensor:
    """`[l, h]` the upper half of each of the layers by mean VHD: one choice for all pictures."""
    mean = divergence_map(one).tensor().float()
    fixed = mean > mean.median(-1, keepdim=True).values
    fixed[[layer for layer in range(len(fixed)) if layer not in LAYERS]] = False
    return fixed


# Writing


@torch.no_grad()
def written(model: Any, scenes: CaptionedShapes, arm: Arm | None = None) -> list[str]:
    """Greedy captions of eight tokens at most."""
    texts: list[str] = []
    for start in range(0, len(scenes), BATCH):
        part = slice(start, start + BATCH)
        inputs = vision_language_inputs(scenes[part])
        with steer(model, *(arm(part) if arm is not None else ())):
            new = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts += [_text(row) for row in new[:, inputs["input_ids"].shape[1] :].tolist()]
    return texts


@torch.no_grad()
def contrasted(model: Any, scenes: CaptionedShapes, other: str, *, strength: float, seed: int = 0) -> list[str]:
    """Greedy captions of `l + strength (l - l')` among words of at least a tenth of the likeliest one's probability.

    other: where l' comes from: "distorted", the picture in as much noise again and more (the form of visual contrastive
    decoding), or "none", the text alone (the form of image-free guidance).
    """
    texts: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(scenes), BATCH):
        some = scenes[start : start + BATCH]
        inputs = vision_language_inputs(some)
        twin = vision_language_inputs(None, [DESCRIBE] * len(some))
        if other == "distorted":
            pixels = inputs["pixel_values"]
            noise = 2.4 * torch.randn(pixels[:, :1].shape, generator=generator)
            twin = {**inputs, "pixel_values": pixels + noise}
        ids, against = inputs["input_ids"], twin["input_ids"]
        new = ids[:, :0]
        for _ in range(8):
            logs, others = (
                model(
                    **{k: v for k, v in given.items() if k == "pixel_values"}, input_ids=torch.cat([prompt, new], 1)
                ).logits[:, -1].log_softmax(-1)
                for given, prompt in ((inputs, ids), (twin, against))
            )  # fmt: skip
            mixed = logs + strength * (logs - others)
            mixed = mixed.masked_fill(logs < logs.amax(-1, keepdim=True) + torch.tensor(0.1).log(), -torch.inf)
            new = torch.cat([new, mixed.argmax(-1, keepdim=True)], 1)
        ended = (new == EOS).cumsum(1) - (new == EOS).int() > 0
        texts += [_text(row) for row in new.masked_fill(ended, PAD).tolist()]
    return texts


def _text(row: Sequence[int]) -> str:
    return " ".join(WORDS[i] for i in row if i not in (PAD, EOS))


def absent(texts: Sequence[str], scenes: CaptionedShapes) -> Tensor:
    """`[n]` how many shapes a caption names that are not there, each once."""
    objects = scenes.objects()
    return torch.tensor(
        [float(len((set(text.split()) & set(SHAPE_WORDS)) - held)) for text, held in zip(texts, objects, strict=True)]
    )


@torch.no_grad()
def caption_divergence(model: Any, scenes: CaptionedShapes) -> tuple[ContextDivergence, Tensor, Tensor]:
    """VHD `[n, 8, l, h]` where each token of the true caption is about to be said, and which are shapes and commas."""
    positions = list(range(-8, 0))
    parts = []
    for start in range(0, len(scenes), BATCH):
        some = scenes[start : start + BATCH]
        texts = [f"{DESCRIBE} {caption}" for caption in some.captions()]
        parts.append(vision_divergence(model, vision_language_inputs(some, texts), positions))
    whole = ContextDivergence(*(torch.cat([getattr(p, n) for p in parts]) for n in ("divergence", "present", "absent")))
    index = torch.arange(8)
    return whole, index[::2], index[1:-1:2]
