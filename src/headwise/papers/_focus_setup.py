"""The models and answers of Focus; its rows are beside it.

One small LLaVA learns what is where on a screen, then to answer at once (the base): it lists shapes and panels,
answers one question after the other about icons of sparse screens, then single questions of all kinds. From there, on
the same held-out screens and for as many steps, one copy goes on answering at once, one learns to write its stages, and
one learns whichever the base's errors call for. A fourth goes on answering at once on twice as many screens for twice
as long.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.papers.running import Run
from headwise.steering.fast_slow import FastSlowDecoder, Given, Grounding, GroundingStage
from headwise.tasks.gui import calibrate_threshold, click_accuracy, label_modes
from headwise.tasks.interfaces import GUI_WORDS, NAMED, SIDE, GuiScreens, cell_boxes, gui_screens, point_of
from headwise.training import OptimiserSpec, fit, warmup_cosine

WORDS = ("<bos>", "<pad>", "<unk>", "<image>", "<eos>", "<fast>", "<slow>", ":", ";", "list", *GUI_WORDS)
ID = {word: number for number, word in enumerate(WORDS)}
BOS, PAD, IMAGE, EOS = (ID[word] for word in ("<bos>", "<pad>", "<image>", "<eos>"))
IMAGE_TOKENS, PATCH = 16, 12
LAYERS, HEADS, HIDDEN, INNER = 4, 8, 64, 128
LEARNING_RATE, WARM_UP, INITIAL = 2e-3, 50, 0.1
LISTING, NAMING, LESSONS = 0.135, 0.4, 0.62  # of the base's steps: lists of shapes among its lessons, named panels
EMPTY, SPARSE, TURNS = 0.5, 0.55, 5  # share of empty cells, that of the lessons' screens, questions of a lesson
STAGES = (GroundingStage("summary", ";", 6), GroundingStage("analysis", ";", 8))
COST = 0.05  # of accuracy, that a slow answer must be worth


@dataclass(frozen=True)
class Budget:
    """Steps and screens. steps: of the base. further: of each copy. pool: screens that the base labels."""

    steps: int = 2700
    further: int = 600
    batch: int = 32
    pool: int = 8192
    test: int = 1536
    calibration: int = 1024
    size: int = 256  # screens answered together


@dataclass(frozen=True)
class Answers:
    """Of each test screen whether the answer is right, and how many tokens it took."""

    right: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Outcomes:
    """What the rows are computed from. kind: of each test screen, as `GUI_KINDS`. words: what its instruction names.

    fast, longer, slow: the copies that know one way; longer is the one with twice the screens and steps. quick,
    thorough: the two ways of the copy that knows both, adaptive its own choice at theta. summary, analysis: whether its
    stages are right. region: whether its point lies in the panel and row that its analysis names. shuffled: right with
    the stages of another screen. follows: of screens with twins, whether the point is the twin's after its analysis.
    label_rate: share of each kind that the base got wrong. pictures: how often the vision tower ran for one batch that
    was answered both ways.
    """

    kind: Tensor
    words: Tensor
    fast: Answers
    longer: Answers
    slow: Answers
    quick: Answers
    thorough: Answers
    adaptive: Answers
    went_slow: Tensor
    p_slow: Tensor
    theta: float
    summary: Tensor
    analysis: Tensor
    region: Tensor
    shuffled: Tensor
    follows: Tensor
    label_rate: dict[str, float]
    pictures: int
    same_pure: bool
    same_scratch: float

    @property
    def complex(self) -> Tensor:
        """Hard and nested screens."""
        return self.kind > 0


def build() -> nn.Module:
    """The untrained model: 16 image tokens, one a cell."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=HIDDEN, initializer_range=INITIAL,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=128, tie_word_embeddings=False,
        initializer_range=INITIAL,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        clean_up_tokenization_spaces=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )


def ids_of(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def prompts(screens: GuiScreens) -> list[list[int]]:
    return [[BOS, *[IMAGE] * IMAGE_TOKENS, *ids_of(text), ID[":"]] for text in screens.instructions()]


def screen_inputs(screens: GuiScreens) -> dict[str, Any]:
    """Prompts for the decoder, padded on the left."""
    rows = prompts(screens)
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": screens.pixel_values.contiguous()}


@dataclass(frozen=True)
class Batch:
    """What a step trains on. counted: True where a token is to be predicted."""

    ids: Tensor
    counted: Tensor
    pixels: Tensor


def screens_of(n: int, **drawn: Any) -> GuiScreens:
    """The screens of this run, of all kinds."""
    return gui_screens(n, empty=EMPTY, **drawn)


def training_batch(screens: GuiScreens, slow: Tensor) -> Batch:
    """Prompts and whole answers, the slow ones with their stages, padded on the right; answers count."""
    starts, rows = prompts(screens), []
    for start, is_slow, summary, analysis, point in zip(
        starts, slow.tolist(), screens.summaries(), screens.analyses(), screens.points(), strict=True
    ):
        said = f"<slow> {summary} ; {analysis} ; {point} <eos>" if is_slow else f"<fast> {point} <eos>"
        rows.append([(start, ids_of(said))])
    return joined(rows, screens)


def listing_batch(screens: GuiScreens, *, panels: bool) -> Batch:
    """What is there, in reading order: the shape of every cell, or the colours of the panels."""
    asked = [ID["list"], *([ID["panel"]] if panels else []), ID[":"]]
    start = [BOS, *[IMAGE] * IMAGE_TOKENS, *asked]
    texts = screens.summaries() if panels else screens.listings()
    return joined([[(start, ids_of(text))] for text in texts], screens)


def lesson_batch(screens: GuiScreens, generator: torch.Generator, *, naming: bool) -> Batch:
    """Questions about icons that are there once, one after the other, each answered at once. naming: panels and rows
    are named as often as for easy screens."""
    odds, rows = torch.tensor(NAMED if naming else (1.0, 0.0, 0.0)), []
    for row, shapes in enumerate(screens.shapes.tolist()):
        once = [cell for cell, shape in enumerate(shapes) if shape >= 0 and shapes.count(shape) == 1]
        order = torch.randperm(len(once), generator=generator)[:TURNS].tolist()
        words = torch.multinomial(odds, TURNS, replacement=True, generator=generator).tolist()
        turns = [([BOS, *[IMAGE] * IMAGE_TOKENS], [])]
        for cell, named in zip((once[place] for place in order), words, strict=False):
            asked = [*ids_of(screens.instruction(row, cell, named)), ID[":"]]
            turns.append((asked, ids_of(f"<fast> {point_of(cell)} <eos>")))
        rows.append(turns)
    return joined(rows, screens)


def joined(rows: list[list[tuple[list[int], list[int]]]], screens: GuiScreens) -> Batch:
    """Rows of (what is given, what is to be said), padded on the right."""
    longest = max(sum(len(given) + len(said) for given, said in row) for row in rows)
    ids, counted = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = 0
        for given, said in row:
            end = place + len(given) + len(said)
            ids[number, place:end] = torch.tensor([*given, *said])
            counted[number, end - len(said) : end] = True
            place = end
    return Batch(ids, counted, screens.pixel_values)


def loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of the tokens that count: tag, stages, point and end, all alike."""
    logits = model(input_ids=batch.ids, pixel_values=batch.pixels).logits[:, :-1]
    counted = batch.counted[:, 1:]
    return nn.functional.cross_entropy(logits[counted], batch.ids[:, 1:][counted])


def train(
    model: nn.Module, batches: Callable[[int, torch.Generator], Batch], steps: int, seed: int, run: Run, name: str
) -> nn.Module:
    """Some steps of the one recipe."""
    fit(
        model,
        batches,
        loss,
        steps=steps,
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE, betas=(0.9, 0.98)),
        schedule=warmup_cosine(min(WARM_UP, max(1, steps // 4))),
        log=lambda record: run.log(f"{name}: step {record['step']}, loss {record['loss']:.3f}"),
        log_every=250,
    )
    return model.eval()


def from_pool(pool: GuiScreens, slow: Tensor, batch: int) -> Callable[[int, torch.Generator], Batch]:
    """Batches drawn from the pool, each screen in its way."""

    def draw(step: int, generator: torch.Generator) -> Batch:
        index = torch.randint(len(pool), (batch,), generator=generator)
        return training_batch(pool[index], slow[index])

    return draw


def decoder(model: nn.Module, threshold: float = 0.5) -> FastSlowDecoder:
    return FastSlowDecoder(model, tokenizer(), stages=STAGES, threshold=threshold, point_tokens=4)


def answered(
    model: nn.Module, screens: GuiScreens, theta: float, size: int, given: Given | None = None
) -> list[Grounding]:
    """The answers to all screens at a threshold; 0 is slow, 1 fast."""
    way, found = decoder(model, theta), []
    for start in range(0, len(screens), size):
        part = slice(start, start + size)
        texts = None if given is None else {name: each[part] for name, each in given.items()}
        found += way.generate(**screen_inputs(screens[part]), given=texts)
    return found


def both_ways(model: nn.Module, screens: GuiScreens, size: int) -> tuple[list[Grounding], list[Grounding]]:
    way = decoder(model)
    fast, slow = [], []
    for start in range(0, len(screens), size):
        one, other = way.both(**screen_inputs(screens[start : start + size]))
        fast, slow = fast + one, slow + other
    return fast, slow


def hits(found: list[Grounding], boxes: Tensor) -> Tensor:
    return click_accuracy([one.point for one in found], boxes).right


def scored(found: list[Grounding], screens: GuiScreens) -> Answers:
    return Answers(hits(found, screens.boxes), torch.tensor([float(one.tokens_used) for one in found]))


@dataclass(frozen=True)
class Trained:
    """The four copies, and how often the base was wrong on each kind of the pool."""

    fast: nn.Module
    longer: nn.Module
    slow: nn.Module
    mixed: nn.Module
    label_rate: dict[str, float]


def trained(run: Run, budget: Budget) -> Trained:
    """Train the base and its copies; every model sees its own part of the seeds."""
    torch.manual_seed(run.seed)
    base, start = build(), 1_000_000 * (run.seed + 1)

    def fresh(step: int, generator: torch.Generator) -> Batch:
        if step >= LESSONS * budget.steps:
            return training_batch(screens_of(budget.batch, generator=generator), torch.zeros(budget.batch))
        naming = step > NAMING * budget.steps
        if (step % 3 == 0 and step < LISTING * budget.steps) or (step % 6 == 3 and naming):
            return listing_batch(gui_screens(budget.batch, generator=generator), panels=naming)
        sparse = gui_screens(budget.batch, mix=(1, 0, 0), empty=SPARSE, generator=generator)
        return lesson_batch(sparse, generator, naming=naming)

    train(base, fresh, budget.steps, start, run, "base")
    run.log(f"labelling {budget.pool} screens that the base has not seen")
    pool = screens_of(budget.pool, seed=start + 1)
    found = answered(base, pool, 1.0, budget.size)
    needed = label_modes([one.point for one in found], pool.boxes)
    kinds = click_accuracy([one.point for one in found], pool.boxes, groups=pool.kinds())
    more = screens_of(2 * budget.pool, seed=start + 2)
    fast, slow = torch.zeros_like(needed), torch.ones_like(needed)

    def copied(name: str, screens: GuiScreens, modes: Tensor, steps: int) -> nn.Module:
        return train(copy.deepcopy(base), from_pool(screens, modes, budget.batch), steps, start + 3, run, name)

    return Trained(
        fast=copied("fast", pool, fast, budget.further),
        longer=copied("fast, twice as much", more, torch.zeros(len(more)), 2 * budget.further),
        slow=copied("slow", pool, slow, budget.further),
        mixed=copied("both", pool, needed, budget.further),
        label_rate={name: 1 - share for name, share in kinds.groups.items()},
    )


def outcomes(run: Run, budget: Budget = Budget()) -> Outcomes:
    """Train, calibrate on held-out screens, and answer the test screens in every way."""
    models = trained(run, budget)
    start = 1_000_000 * (run.seed + 1)
    held_out = screens_of(budget.calibration, seed=start + 10)
    test = screens_of(budget.test, seed=start + 11)
    run.log("calibrating the threshold")
    quick, thorough = both_ways(models.mixed, held_out, budget.size)
    p = torch.tensor([one.p_slow for one in quick])
    theta = calibrate_threshold(p, hits(quick, held_out.boxes), hits(thorough, held_out.boxes), COST)
    run.log(f"answering {budget.test} screens in every way, theta {theta:.3f}")
    quick, thorough = both_ways(models.mixed, test, budget.size)
    adaptive = answered(models.mixed, test, theta, budget.size)
    other = test[torch.arange(len(test)).roll(-1)]
    shuffled = answered(
        models.mixed, test, 0.0, budget.size, {"summary": other.summaries(), "analysis": other.analyses()}
    )
    twins = test.twins()
    double = test[twins != test.target]
    twin = twins[twins != test.target]
    steered = (
        answered(
            models.mixed, double, 0.0, budget.size, {"summary": double.summaries(), "analysis": double.analyses(twin)}
        )
        if len(double)
        else []
    )
    return Outcomes(
        kind=test.kind,
        words=test.named,
        fast=scored(answered(models.fast, test, 1.0, budget.size), test),
        longer=scored(answered(models.longer, test, 1.0, budget.size), test),
        slow=scored(answered(models.slow, test, 0.0, budget.size), test),
        quick=scored(quick, test),
        thorough=scored(thorough, test),
        adaptive=scored(adaptive, test),
        went_slow=torch.tensor([one.mode == "slow" for one in adaptive]),
        p_slow=torch.tensor([one.p_slow for one in quick]),
        theta=theta,
        summary=_equal(thorough, "summary", test.summaries()),
        analysis=_equal(thorough, "analysis", test.analyses()),
        region=torch.tensor([in_region(one) for one in thorough]),
        shuffled=hits(shuffled, test.boxes),
        follows=hits(steered, cell_boxes(twin)) if steered else torch.zeros(0, dtype=torch.bool),
        label_rate=models.label_rate,
        pictures=pictures_read(models.mixed, test[: min(8, len(test))]),
        same_pure=_same_pure(models.mixed, test[:64], quick[:64], thorough[:64]),
        same_scratch=same_from_scratch(models.mixed, test[:64]),
    )


def _equal(found: list[Grounding], stage: str, texts: list[str]) -> Tensor:
    return torch.tensor([one.stage_texts[stage] == text for one, text in zip(found, texts, strict=True)])


def in_region(one: Grounding) -> bool:
    """Whether the point lies in the corner and the row that the analysis names."""
    words = one.stage_texts["analysis"].split()
    if one.point is None or len(words) < 4:
        return False
    x, y = one.point
    corner = ("top" if y < 0.5 else "bottom") + ("left" if x < 0.5 else "right")
    return words[1] == corner and words[3] == ("upper" if y % 0.5 < 0.25 else "lower")


def pictures_read(model: Any, screens: GuiScreens) -> int:
    """How often the vision tower runs while a batch is answered both ways."""
    count = 0

    def seen(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.model.vision_tower.register_forward_hook(seen)
    try:
        decoder(model).both(**screen_inputs(screens))
    finally:
        handle.remove()
    return count


def _same_pure(model: nn.Module, screens: GuiScreens, quick: list[Grounding], thorough: list[Grounding]) -> bool:
    """Whether thresholds 1 and 0 give the tokens of the fast and of the slow way."""
    ends = [answered(model, screens, theta, len(screens)) for theta in (1.0, 0.0)]
    return all([a.tokens for a in x] == [b.tokens for b in y] for x, y in zip(ends, (quick, thorough), strict=True))


@torch.no_grad()
def same_from_scratch(model: Any, screens: GuiScreens) -> float:
    """The share of answers, at theta 0.5, whose tokens are those of transformers' own generation after the tag.

    Answers with a stage that met its limit are left out: generation does not know limits. 0 where none is left.
    """
    way = decoder(model)
    same = []
    for number in range(len(screens)):
        inputs = screen_inputs(screens[number : number + 1])
        (one,) = way.generate(**inputs)
        if one.cut:
            continue
        tag = torch.tensor([[one.tokens[0]]])
        ids = torch.cat([inputs["input_ids"], tag], 1)
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            max_new_tokens=max(1, len(one.tokens) - 1),
            do_sample=False,
        )[0, ids.shape[1] - 1 :].tolist()
        same.append(tuple(new) == one.tokens)
    return sum(same) / max(1, len(same))


def composed(found: Outcomes, slow: Tensor) -> Answers:
    """The answers of a switch that sends these screens the slow way; nothing is run again."""
    return Answers(
        torch.where(slow, found.thorough.right, found.quick.right),
        torch.where(slow, found.thorough.tokens, found.quick.tokens),
    )


def with_theta(found: Outcomes, theta: float | int) -> Outcomes:
    """The same outcomes, switched at another threshold."""
    slow = (found.p_slow > theta) | (theta <= 0)
    return replace(found, theta=theta, went_slow=slow, adaptive=composed(found, slow))
