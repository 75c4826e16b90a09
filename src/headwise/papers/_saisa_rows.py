"""The rows of saisa.py, one function for each, and its picture."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headwise.models.saisa import SaisaConfig
from headwise.models.saisa_costs import prefill_flops, prefill_parts, training_flops
from headwise.papers._saisa_setup import (
    ARMS,
    BLIND,
    IMAGE,
    IMAGE_TOKENS,
    LLAVA,
    NAAVIT,
    NAMING,
    SAISA,
    TEXT_TOKENS,
    TWICE,
    UNTRAINED,
    Trained,
    naming_ids,
    sizes,
    tests,
)
from headwise.papers.running import Run
from headwise.papers.verdicts import Measured
from headwise.report.plots import COLOURS, bars, figure

TEXT, PICTURE = 64, 576  # tokens of a prompt at full size; 576 is LLaVA-1.5's
CAPTIONS, CONVERSATIONS = 558_000, 665_000
CAPTION_TEXT, CONVERSATION_TEXT = 32, 256
TIE = 1e-9


@cache
def llava_sizes(alignment: str) -> SaisaConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels and Vicuna-7B."""
    text = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    return SaisaConfig(alignment, text_config=text)


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _saved(alignment: str, text: int, image: int = PICTURE) -> float:
    whole = prefill_flops(llava_sizes("embedding"), text, image)
    return 1 - prefill_flops(llava_sizes(alignment), text, image) / whole


# --- what the networks do -------------------------------------------------------------------------------------------


@torch.no_grad()
def moved(model: Any, ids: Tensor, pixels: Tensor, seed: int, *, positions_too: bool = True) -> float:
    """The largest change of a text logit when image tokens change places, with their positions or without."""
    order = torch.randperm(IMAGE_TOKENS, generator=torch.Generator().manual_seed(seed))
    images = model.get_image_features(pixel_values=pixels, return_dict=True)
    other = copy.copy(images)
    other.pooler_output = [one[order] for one in images.pooler_output]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    shifted = positions.clone()
    if positions_too:
        places = (ids[0] == IMAGE).nonzero()[:, 0]
        shifted[:, places] = positions[:, places[order]]
    given = {"input_ids": ids, "use_cache": False}
    before = model(**given, position_ids=positions, mm_encoder_outputs={"image": images}).logits
    after = model(**given, position_ids=shifted, mm_encoder_outputs={"image": other}).logits
    return float((after - before)[ids != IMAGE].abs().max())


def interactions(made: Trained, seed: int) -> Measured:
    scenes = tests(seed, 16).naming
    ids, pixels = naming_ids(scenes), scenes.pixel_values
    with_them = {name: moved(model, ids, pixels, seed) for name, model in made.models.items()}
    without = {name: moved(model, ids, pixels, seed, positions_too=False) for name, model in made.models.items()}
    margin = min(with_them[LLAVA] - 0.01, 0.001 - with_them[NAAVIT], 0.001 - with_them[SAISA])
    said = lambda found: ", ".join(f"{name} {value:.1e}" for name, value in found.items())  # noqa: E731
    return Measured(
        measured=f"largest change of a text logit: {said(with_them)}",
        control=f"without their positions: {said(without)}",
        holds=margin >= 0,
        margin=margin,
        values={f"{name}, moved": value for name, value in with_them.items()},
    )


def reach(model: Any, ids: Tensor, pixels: Tensor) -> float:
    """The largest gradient of an image token's last hidden state in the hidden state of another token at a layer's
    input, every row computed."""
    model = copy.deepcopy(model)
    model.config.implementation = "reference"
    stack, kept = model.model.language_model, []

    def keep(_: Any, args: tuple, kwargs: dict) -> tuple:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        kept.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    last = stack.layers[-1]
    outputs: list[Tensor] = []
    hooks = [last.register_forward_pre_hook(keep, with_kwargs=True)]
    hooks.append(last.register_forward_hook(lambda _, args, out: outputs.append(out)))
    model(input_ids=ids, pixel_values=pixels, use_cache=False)
    for hook in hooks:
        hook.remove()
    place = int((ids[0] == IMAGE).nonzero()[-1])
    (gradient,) = torch.autograd.grad(outputs[0][:, place].square().sum(), kept[0])
    gradient[:, place] = 0
    return float(gradient.abs().max())


@torch.no_grad()
def apart(model: Any, ids: Tensor, pixels: Tensor) -> float:
    """The largest difference of text logits between text rows computed alone and all rows, the batch padded left."""
    ids = torch.nn.functional.pad(ids, (3, 0))
    ids[0] = ids[0].roll(-3)  # the first row's padding stands on the right, so that images start at other columns
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels, "use_cache": False}
    found = []
    for implementation in ("compressed", "reference"):
        model.config.implementation = implementation
        found.append(model(**given).logits)
    model.config.implementation = "auto"
    return float((found[0] - found[1])[(ids != IMAGE) & (ids != 0)].abs().max())


def eliminates(made: Trained, seed: int) -> Measured:
    scenes = tests(seed, 8).naming
    ids, pixels = naming_ids(scenes), scenes.pixel_values
    found = {name: reach(made.models[name], ids, pixels) for name in (LLAVA, NAAVIT)}
    difference = apart(made.models[NAAVIT], ids, pixels)
    margin = min(-found[NAAVIT], 1e-4 - difference)
    return Measured(
        measured=(
            f"gradient of an image token in any other token {found[NAAVIT]:.1e}; text rows alone differ by "
            f"{difference:.1e}"
        ),
        control=f"LLaVA's gradient {found[LLAVA]:.1e}",
        holds=margin >= 0,
        margin=margin,
        values={"gradient, NAAViT": found[NAAVIT], "gradient, LLaVA": found[LLAVA], "rows apart": difference},
    )


def redundant(made: Trained) -> Measured:
    gaps = {task: made.scores[NAAVIT][task] - made.scores[LLAVA][task] for task in (NAMING, TWICE)}
    margin = min(gaps.values()) + 0.02
    said = lambda name: ", ".join(f"{task} {made.scores[name][task]:.1%}" for task in (NAMING, TWICE))  # noqa: E731
    return Measured(
        measured=(
            f"NAAViT against LLaVA: {NAMING} {_points(gaps[NAMING])} ({made.scores[LLAVA][NAMING]:.1%} LLaVA), {TWICE} "
            f"{_points(gaps[TWICE])} ({made.scores[LLAVA][TWICE]:.1%} LLaVA)"
        ),
        control=f"{UNTRAINED}: {said(UNTRAINED)}; {BLIND}: {said(BLIND)}",
        holds=margin >= 0,
        margin=margin,
        values={f"{name}, {task}": score for name, own in made.scores.items() for task, score in own.items()},
    )


def accuracy(made: Trained) -> Measured:
    gain = made.mean(SAISA) - made.mean(LLAVA)
    margin = gain - TIE
    return Measured(
        measured=(
            f"SAISA {made.mean(SAISA):.1%}, LLaVA {made.mean(LLAVA):.1%} ({NAMING} "
            f"{_points(made.scores[SAISA][NAMING] - made.scores[LLAVA][NAMING])}, {TWICE} "
            f"{_points(made.scores[SAISA][TWICE] - made.scores[LLAVA][TWICE])})"
        ),
        control=f"NAAViT {made.mean(NAAVIT):.1%}",
        holds=margin >= 0,
        margin=margin,
        values={name: made.mean(name) for name in ARMS},
    )


def naming(made: Trained) -> Measured:
    gap = made.scores[SAISA][NAMING] - made.scores[LLAVA][NAMING]
    costs = {name: prefill_flops(sizes(ARMS[name]), TEXT_TOKENS, IMAGE_TOKENS) for name in ARMS}
    saved = {name: 1 - cost / costs[LLAVA] for name, cost in costs.items()}
    margin = min(gap + 0.02, saved[SAISA] - 0.4)
    return Measured(
        measured=(
            f"{made.scores[SAISA][NAMING]:.1%}, {_points(gap)} against LLaVA, with {saved[SAISA]:.1%} fewer operations "
            f"({IMAGE_TOKENS} image and {TEXT_TOKENS} text tokens)"
        ),
        control=(
            f"NAAViT {made.scores[NAAVIT][NAMING]:.1%} with {saved[NAAVIT]:.1%} fewer; the first word, of which no "
            f"other word tells: SAISA {made.scores[SAISA]['naming, first word']:.1%}, LLaVA "
            f"{made.scores[LLAVA]['naming, first word']:.1%}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"gap": gap, "saved": saved[SAISA], "saved, NAAViT": saved[NAAVIT]},
    )


# --- what they cost -------------------------------------------------------------------------------------------------


def efficient(made: Trained) -> Measured:
    configs = {name: sizes(alignment) for name, alignment in ARMS.items()}
    costs = {
        name: {
            "prefill": prefill_flops(config, TEXT_TOKENS, IMAGE_TOKENS),
            "step of the projectors": training_flops(config, TEXT_TOKENS, IMAGE_TOKENS, "projectors"),
            "step of everything": training_flops(config, TEXT_TOKENS, IMAGE_TOKENS, "all"),
            "seconds of a step": made.seconds[name],
        }
        for name, config in configs.items()
    }
    saved = {name: {what: 1 - cost / costs[LLAVA][what] for what, cost in own.items()} for name, own in costs.items()}
    margin = min(saved[SAISA].values()) - TIE
    said = lambda name: ", ".join(f"{what} {value:.1%}" for what, value in saved[name].items())  # noqa: E731
    return Measured(
        measured=f"less than LLaVA: {said(SAISA)} ({1000 * made.seconds[SAISA]:.0f} ms of a processor a step)",
        control=f"NAAViT: {said(NAAVIT)}",
        holds=margin >= 0,
        margin=margin,
        values={f"saved, {what}": value for what, value in saved[SAISA].items()},
    )


def both_blocks() -> Measured:
    parts = {name: prefill_parts(llava_sizes(alignment), TEXT, PICTURE) for name, alignment in ARMS.items()}
    attention = {name: sum(own) - own.feed_forward for name, own in parts.items()}
    saved = {
        name: (1 - attention[name] / attention[LLAVA], 1 - own.feed_forward / parts[LLAVA].feed_forward)
        for name, own in parts.items()
    }
    margin = min(saved[SAISA]) - TIE
    return Measured(
        measured=(
            f"{saved[SAISA][0]:.1%} fewer in attention blocks, projectors counted with them; {saved[SAISA][1]:.1%} "
            "fewer in feed-forward networks"
        ),
        control=f"NAAViT {saved[NAAVIT][0]:.1%} and {saved[NAAVIT][1]:.1%}",
        holds=margin >= 0,
        margin=margin,
        values={"attention": saved[SAISA][0], "feed-forward": saved[SAISA][1]},
    )


def inference() -> Measured:
    saved = {text: _saved("saisa", text) for text in (40, TEXT, 128)}
    margin = saved[TEXT] - 0.655
    return Measured(
        measured=f"{saved[TEXT]:.1%} fewer with {TEXT} text tokens and {PICTURE} image tokens",
        control=(
            f"{saved[40]:.1%} with 40 text tokens, {saved[128]:.1%} with 128; NAAViT {_saved('naavit', TEXT):.1%} with "
            f"{TEXT}"
        ),
        holds=margin >= 0,
        margin=margin,
        values={f"saved, {text} text tokens": value for text, value in saved.items()},
    )


def budget_saved(conversation: int, caption: int = CAPTION_TEXT) -> float:
    """Share of the operations of both stages that SAISA saves, at LLaVA-1.5's sizes."""
    whole, ours = (
        CAPTIONS * training_flops(config, caption, PICTURE, "projectors")
        + CONVERSATIONS * training_flops(config, conversation, PICTURE, "all")
        for config in (llava_sizes("embedding"), llava_sizes("saisa"))
    )
    return 1 - ours / whole


def budget() -> Measured:
    found = budget_saved(CONVERSATION_TEXT)
    others = {text: budget_saved(text) for text in (64, 512, 1024)}
    longest = next(text for text in range(8, 8192, 8) if budget_saved(text) < 0.26) - 8
    margin = found - 0.26
    return Measured(
        measured=(
            f"{found:.1%} fewer with {CAPTION_TEXT} text tokens to a caption and {CONVERSATION_TEXT} to a talk; at "
            f"least 26 % up to {longest} text tokens to a talk"
        ),
        control=", ".join(f"{value:.1%} with {text}" for text, value in others.items()),
        holds=margin >= 0,
        margin=margin,
        values={"saved": found, "longest": longest},
    )


def cross_attention(every: int) -> tuple[int, int]:
    """Operations of a prefill, and parameters that start from nothing, of LLaVA-1.5's language model with a block of
    cross-attention and a feed-forward network of four widths before every so-manieth layer (Alayrac et al., 2022)."""
    config: Any = llava_sizes("embedding")
    d, c, blocks = config.text_config.hidden_size, config.vision_config.hidden_size, 32 // every
    block = 4 * TEXT * d * d + 4 * PICTURE * c * d + 4 * TEXT * PICTURE * d + 16 * TEXT * d * d
    return prefill_flops(config, TEXT, 0) + blocks * block, blocks * (2 * d * d + 2 * c * d + 8 * d * d)


def trade_off() -> Measured:
    config: Any = llava_sizes("embedding")
    d, c = config.text_config.hidden_size, config.vision_config.hidden_size
    whole, ours = (prefill_flops(llava_sizes(name), TEXT, PICTURE) for name in ("embedding", "saisa"))
    projector = c * d + d + d * d + d
    found = {every: cross_attention(every) for every in (1, 4, 8)}
    cost, parameters = whole / found[4][0], found[4][1] / projector
    margin = min(cost - 2, parameters - 50)
    others = ", ".join(
        f"every {every}: {whole / found[every][0]:.1f} and {found[every][1] / projector:.0f}" for every in (1, 8)
    )
    return Measured(
        measured=f"{cost:.1f} times the operations of cross attention, which has {parameters:.0f} times the parameters",
        control=(
            f"a block before {others}; SAISA needs {ours / found[4][0]:.1f} times its operations and has 32 times the "
            "parameters of the projector"
        ),
        holds=margin >= 0,
        margin=margin,
        values={"operations": cost, "parameters": parameters},
    )


@torch.no_grad()
def counted(made: Trained) -> Measured:
    ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE), torch.full((1, TEXT_TOKENS), 2)], 1)
    pixels, differences = torch.zeros(1, 3, 32, 32), {}
    for name, model in made.models.items():
        inner = copy.deepcopy(model.model)
        inner.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            inner(ids, pixel_values=pixels, use_cache=False)
        with FlopCounterMode(display=False) as tower:
            inner.vision_tower(pixels)
        own = counter.get_total_flops() - tower.get_total_flops()
        differences[name] = own - prefill_flops(model.config, TEXT_TOKENS, IMAGE_TOKENS)
    worst = max(map(abs, differences.values()))
    return Measured(
        measured=", ".join(f"{name} {value:+d}" for name, value in differences.items()),
        holds=worst == 0,
        margin=-float(worst),
    )


@torch.no_grad()
def same_rows(made: Trained, seed: int) -> Measured:
    scenes = tests(seed, 8).naming
    ids, pixels = naming_ids(scenes), scenes.pixel_values
    apart_by, same = {}, {}
    for name in (NAAVIT, SAISA):
        model = made.models[name]
        apart_by[name] = apart(model, ids, pixels)
        given = {"input_ids": ids[:, : 2 + IMAGE_TOKENS], "pixel_values": pixels}
        options = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": [IMAGE]}
        cached = model.generate(**given, **options)
        same[name] = torch.equal(cached, model.generate(**given, **options, use_cache=False))
    worst = max(apart_by.values())
    margin = min(1e-4 - worst, 0.0 if all(same.values()) else -1.0)
    return Measured(
        measured=(
            f"logits differ by at most {worst:.1e}; "
            f"{'the same texts' if all(same.values()) else 'other texts'} with a cache and without"
        ),
        holds=margin >= 0,
        margin=margin,
        values={f"{name}, apart": value for name, value in apart_by.items()},
    )


def draw(run: Run, made: Trained) -> None:
    path = run.out / f"{run.paper.slug}.png"
    with figure(path, 3, width=4.6) as (scores, costs, lengths):
        series = {name: [100 * made.scores[name][task] for task in (NAMING, TWICE)] for name in ARMS}
        series["another picture"] = [100 * made.scores[BLIND][task] for task in (NAMING, TWICE)]
        bars(scores, [NAMING, TWICE], series, y="right, %", title="After as many steps from one start")
        parts = {name: prefill_parts(llava_sizes(alignment), TEXT, PICTURE) for name, alignment in ARMS.items()}
        floor = [0.0] * len(parts)
        for number, what in enumerate(("projectors", "projections", "scores", "feed_forward")):
            values = [getattr(own, what) / 1e12 for own in parts.values()]
            costs.bar(list(parts), values, bottom=floor, color=COLOURS[number], label=what.replace("_", "-"), width=0.6)
            floor = [low + value for low, value in zip(floor, values, strict=True)]
        costs.legend(fontsize=8)
        costs.set(ylabel="10¹² operations", title=f"Prefill at LLaVA-1.5's sizes, {TEXT} text tokens")
        texts = [16, 32, 64, 128, 256, 512, 1024, 2048]
        lengths.plot(texts, [100 * _saved("saisa", text) for text in texts], color=COLOURS[0], label="SAISA, prefill")
        lengths.plot(texts, [100 * _saved("naavit", text) for text in texts], color=COLOURS[1], label="NAAViT, prefill")
        trained = [100 * budget_saved(text) for text in texts]
        lengths.plot(texts, trained, color=COLOURS[2], label="SAISA, training", linestyle="--")
        for level in (66, 26):
            lengths.axhline(level, color="#5b6168", linewidth=0.8, linestyle=":")
        lengths.set_xscale("log", base=2)
        lengths.set_xticks(texts, [str(text) for text in texts])
        lengths.legend(fontsize=8)
        lengths.set(
            xlabel="text tokens", ylabel="operations saved, %", title="By length; dots: the abstract's 66 and 26 %"
        )
    run.figures.append(path)
