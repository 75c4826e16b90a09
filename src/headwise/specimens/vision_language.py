"""The `vision-language` specimen: a small LLaVA that captions pictures of shapes and answers whether a shape is there.

A CLIP tower of two layers, LLaVA's projector, a Llama of four layers with eight heads: transformers' own
`LlavaForConditionalGeneration`, trained as a whole. Half of the batches are pictures with captions, a quarter are
captions without a picture, which burn in the prior over words, a quarter are pictures with questions. Where a picture
breaks the prior the model names what usually follows rather than what is there more often than noise explains; how
often is measured in the card.

A caption's prompt is `<bos>`, the image tokens, "describe :"; a question's is `<bos>`, the image tokens, "is there a
ring ?". `vision_language_inputs` makes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.specimens._training import Timed, ran, seeded
from headwise.tasks.captions import (
    PICTURE_MEAN,
    PICTURE_STD,
    QUESTION_KINDS,
    SHAPE_WORDS,
    CaptionedShapes,
    shapes_captions,
)
from headwise.tasks.hallucination import chair, polling
from headwise.training import OptimiserSpec, fit, warmup_cosine

__all__ = ["vision_language_inputs", "vision_language_model"]

NAME = "vision-language"
SUMMARY = "a LLaVA of four layers that captions pictures of shapes, answers yes or no, and hallucinates what is typical"

SIGMA = 1.2
STEPS, BATCH, QUESTIONS = 2000, 64, 4
LEARNING_RATE, WARM_UP = 2e-3, 50
LAYERS, HEADS, HIDDEN, INNER = 4, 8, 64, 128
KINDS = {"captions": 0.5, "text": 0.25, "questions": 0.25}  # of the batches
WORDS = (
    "<bos>", "<pad>", "<unk>", "<image>", "<eos>", "describe", ":", ",", "?", "is", "there", "a", "yes", "no",
    *SHAPE_WORDS,
)  # fmt: skip
ID = {word: number for number, word in enumerate(WORDS)}
BOS, PAD, IMAGE, EOS = (ID[word] for word in ("<bos>", "<pad>", "<image>", "<eos>"))
IMAGE_TOKENS = 16
DESCRIBE = "describe :"


def build() -> nn.Module:
    """The untrained model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=HIDDEN,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    return model


def tokenizer() -> Any:
    """One token a word; `<image>` is special, so that a processor may write it many times without spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        clean_up_tokenization_spaces=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(words: Any = None) -> Any:
    """LLaVA's own processor for this model: pictures of 32 x 32 pixels and text with an `<image>` for each."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": 32, "width": 32},
        do_center_crop=False,
        image_mean=[PICTURE_MEAN] * 3,
        image_std=[PICTURE_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer() if words is None else words,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def vision_language_inputs(
    scenes: CaptionedShapes | None, texts: Sequence[str] | str = DESCRIBE, *, padding: str = "left"
) -> dict[str, Tensor]:
    """Model inputs of some pictures, one text behind each: `<bos>`, 16 image tokens, the text.

    scenes: None makes prompts without a picture. texts: words between spaces, one text for all or one each, a caption
    begun included ("describe : ring ,"). padding: the side on which shorter rows are filled up.
    Raises ValueError for words that the model does not know and for texts that are not as many as the pictures.
    """
    if isinstance(texts, str):
        texts = [texts] * (1 if scenes is None else len(scenes))
    if scenes is not None and len(texts) != len(scenes):
        raise ValueError(f"vision_language_inputs: {len(texts)} texts for {len(scenes)} pictures; give one each")
    if padding not in ("left", "right"):
        raise ValueError(f"vision_language_inputs: padding is {padding!r}; expected left or right")
    picture = [IMAGE] * (IMAGE_TOKENS if scenes is not None else 0)
    rows = [[BOS, *picture, *_ids(text)] for text in texts]
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(longest - len(row), None) if padding == "left" else slice(len(row))
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    made = {"input_ids": ids, "attention_mask": mask}
    return made if scenes is None else {**made, "pixel_values": scenes.pixel_values.contiguous()}


def _ids(text: str) -> list[int]:
    words = text.split()
    for word in words:
        if word not in ID:
            raise ValueError(f"vision_language_inputs: {word!r} is no word of the model; it knows {', '.join(WORDS)}")
    return [ID[word] for word in words]


@dataclass(frozen=True)
class Batch:
    """What a step trains on. counted: True where a token is to be predicted."""

    kind: str
    ids: Tensor
    counted: Tensor
    pixels: Tensor | None


def caption_batch(scenes: CaptionedShapes, pictures: bool) -> Batch:
    """Whole captions, with or without their pictures; the words after the prompt count, `<eos>` included."""
    n, k = scenes.shapes.shape
    start = torch.tensor([BOS, *[IMAGE] * (IMAGE_TOKENS * pictures), *_ids(DESCRIBE)])
    said = torch.full((n, 2 * k), ID[","])
    said[:, ::2] = scenes.shapes + ID[SHAPE_WORDS[0]]
    said[:, -1] = EOS
    ids = torch.cat([start.expand(n, -1), said], 1)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, len(start) :] = True
    return Batch("captions" if pictures else "text", ids, counted, scenes.pixel_values if pictures else None)


def question_batch(scenes: CaptionedShapes, questions: int, generator: torch.Generator) -> Batch:
    """Some questions about each picture, one after the other; the answers count, and the `<eos>` after the last.

    Half of them ask for a shape that is there; the others are of the three kinds alike.
    """
    n = len(scenes)
    asked, rows = [], torch.arange(n)
    for _ in range(questions):
        kinds = [None, *QUESTION_KINDS]
        drawn = [scenes.questions(kind, generator) for kind in kinds]
        pick = torch.multinomial(torch.tensor([3.0, 1.0, 1.0, 1.0]), n, replacement=True, generator=generator)
        shape = torch.stack([one.shape for one in drawn])[pick, rows]
        words = torch.tensor(_ids(f"is there a {SHAPE_WORDS[0]} ? yes")).repeat(n, 1)
        words[:, 3] += shape
        words[:, 5] += (ID["no"] - ID["yes"]) * (pick > 0)
        asked.append(words)
    start = torch.tensor([BOS, *[IMAGE] * IMAGE_TOKENS]).expand(n, -1)
    ids = torch.cat([start, *asked, torch.full((n, 1), EOS)], 1)
    counted = torch.isin(ids, torch.tensor([ID["yes"], ID["no"], EOS]))
    return Batch("questions", ids, counted, scenes.pixel_values)


def draw(step: int, generator: torch.Generator, *, sigma: float) -> Batch:
    """The batch of a step: its kind is drawn first."""
    kind = list(KINDS)[int(torch.multinomial(torch.tensor(list(KINDS.values())), 1, generator=generator))]
    scenes = shapes_captions(BATCH, sigma=sigma, generator=generator)
    if kind == "questions":
        return question_batch(scenes, 1 + int(torch.randint(QUESTIONS, (), generator=generator)), generator)
    return caption_batch(scenes, kind == "captions")


def loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the tokens that count."""
    pictures = {} if batch.pixels is None else {"pixel_values": batch.pixels}
    logits = model(input_ids=batch.ids, **pictures).logits[:, :-1]
    value = nn.functional.cross_entropy(logits[batch.counted[:, 1:]], batch.ids[:, 1:][batch.counted[:, 1:]])
    return value, {batch.kind: value.detach()}


@torch.no_grad()
def next_shapes(model: Any, scenes: CaptionedShapes, *, size: int = 256) -> Tensor:
    """`[n, k]` the shape that the model says next, the true caption so far being given: the most likely shape word."""
    found = []
    first = ID[SHAPE_WORDS[0]]
    for start in range(0, len(scenes), size):
        batch = caption_batch(scenes[start : start + size], True)
        logits = model(input_ids=batch.ids, pixel_values=batch.pixels).logits
        at = torch.arange(scenes.shapes.shape[1]) * 2 + batch.ids.shape[1] - 2 * scenes.shapes.shape[1] - 1
        found.append(logits[:, at, first : first + len(SHAPE_WORDS)].argmax(-1))
    return torch.cat(found)


@torch.no_grad()
def written_captions(model: Any, scenes: CaptionedShapes, *, size: int = 256) -> list[str]:
    """What the model writes about each picture, greedily, eight tokens at most."""
    texts = []
    for start in range(0, len(scenes), size):
        inputs = vision_language_inputs(scenes[start : start + size])
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts += [" ".join(WORDS[i] for i in row if i not in (PAD, EOS)) for row in new.tolist()]
    return texts


@torch.no_grad()
def answers(model: Any, scenes: CaptionedShapes, texts: Sequence[str], *, size: int = 256) -> list[str]:
    """The word that the model says to each question."""
    said: list[str] = []
    for start in range(0, len(scenes), size):
        inputs = vision_language_inputs(scenes[start : start + size], texts[start : start + size])
        said += [WORDS[i] for i in model(**inputs).logits[:, -1].argmax(-1).tolist()]
    return said


def evaluate(model: Any, *, sigma: float = SIGMA, pictures: int = 512, seed: int = 10_000) -> dict[str, Any]:
    """What the model sees and what it makes up, on pictures that training did not draw, ordinary and counterfactual.

    accuracy, typical: of the second to fourth shape, the caption so far being given: how often the right shape is said
    next, and how often the typical successor of the one before. first: accuracy of the first shape, before which
    nothing was said. written: CHAIR of greedy captions, and how often the typical successor is named that is not there.
    questions: of each kind of negative with as many positives.
    """
    table: dict[str, Any] = {}
    for name, other in (("ordinary", False), ("counterfactual", True)):
        scenes = shapes_captions(pictures, sigma=sigma, counterfactual=other, seed=seed + other)
        said = next_shapes(model, scenes)
        later, before = said[:, 1:], scenes.typical[:, :-1]
        row: dict[str, Any] = {
            "accuracy": _share(later == scenes.shapes[:, 1:]),
            "typical": _share(later == before),
            "first": _share(said[:, 0] == scenes.shapes[:, 0]),
        }
        texts = written_captions(model, scenes)
        measured = chair(texts, scenes.objects())
        row["written"] = {key: round(value, 4) for key, value in vars(measured).items()}
        row["questions"] = {}
        for kind in QUESTION_KINDS:
            generator = torch.Generator().manual_seed(seed)
            asked = [scenes.questions(None, generator), scenes.questions(kind, generator)]
            said_yes = [word for one in asked for word in answers(model, scenes, one.texts())]
            truth = [bool(right) for one in asked for right in one.answer]
            row["questions"][kind] = {key: round(value, 4) for key, value in vars(polling(said_yes, truth)).items()}
        table[name] = row
    return table


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def train(
    out: str | Path,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    steps: int | None = None,
    others: Sequence[int] | None = None,
    sigma: float = SIGMA,
) -> Path:
    """Train from nothing; write model, processor, tokenizer and card to `out`.

    steps: another number of steps. sigma: of the pictures' noise; in stronger noise more is made up. others: further
    seeds, whose weights are written beside the model's for `vision_language_model`; None means the two after `seed`.
    """
    from headwise.specimens.registry import write_specimen

    model, history, phases = trained(seed, sigma=sigma, steps=steps, log=log)
    states, figures = {}, {}
    for other in (seed + 1, seed + 2) if others is None else others:
        found = trained(other, sigma=sigma, steps=steps, log=log)[0]
        states[f"seed-{other}"] = found.state_dict()
        figures[str(other)] = evaluate(found, sigma=sigma)
    card = {
        "summary": SUMMARY,
        **ran(history, phases, seed),
        "recipe": {
            "pictures": f"shapes_captions(sigma={sigma}), {BATCH} a step",
            "batches": KINDS,
            "optimiser": f"AdamW {LEARNING_RATE}, betas 0.9 0.98, warm-up {WARM_UP}, cosine to 0, clip 1",
        },
        "sigma": sigma,
        "losses": history.records[-1],
        "figures": evaluate(model, sigma=sigma),
        "figures_of_other_seeds": figures,
    }
    return write_specimen(Path(out), model, processor(), card, NAME, states)


def vision_language_model(seed: int = 0, *, log: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The specimen trained from another seed: its shipped weights where there are some, else trained now (3 minutes).

    Seeds 0 to 2 ship.
    """
    from safetensors.torch import load_file

    from headwise.specimens.registry import load_specimen

    specimen = load_specimen(NAME)
    if seed == specimen.card["seed"]:
        return specimen.model
    path = Path(str(specimen.folder)) / f"seed-{seed}.safetensors"
    if not path.exists():
        return trained(seed, sigma=specimen.card["sigma"], log=log)[0]
    state = {key: value.to(specimen.model.dtype) for key, value in load_file(path).items()}
    specimen.model.load_state_dict(state)
    return specimen.model


def trained(
    seed: int,
    *,
    sigma: float = SIGMA,
    steps: int | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, Any, list[Timed]]:
    """A trained model, rounded to bfloat16 as it ships, its history and its one phase."""
    phases = [Timed(STEPS if steps is None else steps)]
    model = seeded(build, seed)
    history = fit(
        model,
        lambda step, generator: draw(step, generator, sigma=sigma),
        loss,
        steps=phases[0].steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE),
        schedule=warmup_cosine(WARM_UP),
        log=log,
    )
    with torch.no_grad():  # what ships is what was measured; buffers are not stored and stay exact
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model, history, phases
