"""What lscenellm.py measures on: a small decoder on generated scenes, with four ways of looking at fine tokens.

One decoder learns to look regions up by coarse tokens, as a 3D language model can before it gets a magnifier; every arm
goes on from it, but for the one of all fine tokens, which goes on from the trained magnifier.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from headwise.models.scene_magnifier import SceneMagnifier, SceneMagnifierConfig
from headwise.ops.regions import select_regions
from headwise.papers.running import Run
from headwise.tasks.coarse_to_fine import DIM, SCENE, VOCABULARY, CoarseToFine, coarse_to_fine_scene
from headwise.tasks.cross_rooms import cross_room_scenes
from headwise.tasks.points import scene_tokens
from headwise.training import OptimiserSpec, fit, warmup_cosine

BASE_STEPS, STEPS, BATCH, RATE = 400, 1200, 32, 2e-3
START_LAYER = 0  # that looks regions up in the base, so that later layers can magnify
PLUG_STEPS, PLUG_RATE = 400, 1e-3
LARGE, SMALL = 16, 4  # regions of a scene
SCENES = 512  # of each size, never trained on
COARSE, MAGNIFIER, RANDOM, ALL = "coarse only", "magnifier", "random selection", "all fine tokens"
ARMS = (COARSE, MAGNIFIER, RANDOM, ALL)
PLUGGED, UNPLUGGED = "plugged in", "tuned without"
DETAIL, KIND = "detail", "kind"

Choose = Callable[[int, Tensor], Tensor] | None


def nothing(layer: int, preference: Tensor) -> Tensor:
    return torch.zeros_like(preference, dtype=torch.bool)


def everything(layer: int, preference: Tensor) -> Tensor:
    return torch.ones_like(preference, dtype=torch.bool)


def at_random(layer: int, preference: Tensor) -> Tensor:
    """As many regions in every row as the selector would take, any of them."""
    wanted = select_regions(preference).sum(-1, keepdim=True)
    return torch.rand_like(preference).argsort(-1).argsort(-1) < wanted


CHOICES: dict[str, Choose] = {COARSE: nothing, MAGNIFIER: None, RANDOM: at_random, ALL: everything}


def build(seed: int) -> SceneMagnifier:
    """Four layers of width 64; the first one selects for the second, and so on."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = SceneMagnifierConfig(
        text, scene_dim=DIM, scene_token_id=SCENE, start_layer=START_LAYER, projector="linear", initializer_range=0.1
    )
    return SceneMagnifier(config)


def train(
    model: SceneMagnifier, arm: str, seed: int, steps: int = STEPS, rate: float = RATE, details: float = 0.5
) -> SceneMagnifier:
    """In place; every fourth batch has small scenes. details: share of the questions that ask for one."""
    model.choose = CHOICES[arm]

    def batches(step: int, generator: torch.Generator) -> CoarseToFine:
        regions = SMALL if step % 4 == 3 else LARGE
        return coarse_to_fine_scene(BATCH, regions=regions, details=details, generator=generator)

    def loss(net: Any, batch: CoarseToFine) -> Tensor:
        return nn.functional.cross_entropy(answers(net, batch), batch.answer)

    rule = OptimiserSpec(lr=rate)
    fit(model, batches, loss, steps=steps, seed=seed, optimiser=rule, schedule=warmup_cosine(max(1, steps // 15)))
    return model


def magnifying(model: SceneMagnifier) -> SceneMagnifier:
    """A copy whose fine projections start as the layers' own."""
    made = copy.deepcopy(model)
    for layer, part in made.magnifiers.items():
        attention: Any = made.decoder.model.layers[int(layer)].self_attn
        fine: Any = part
        fine.k_fine.load_state_dict(attention.k_proj.state_dict())
        fine.v_fine.load_state_dict(attention.v_proj.state_dict())
    return made


def answers(model: SceneMagnifier, batch: CoarseToFine) -> Tensor:
    """`[n, vocabulary]` logits of the answer."""
    return model(batch.ids, coarse=batch.coarse, fine=batch.fine, logits_to_keep=1).logits[:, -1]


def questions(scenes: CoarseToFine, what: str) -> CoarseToFine:
    """The scenes, all asked for a detail or all for a kind."""
    return scenes.asking(scenes.asked, torch.full_like(scenes.detail, int(what == DETAIL)))


@torch.no_grad()
def accuracy(model: SceneMagnifier, scenes: CoarseToFine, choose: Choose | str = "own") -> float:
    """Share of right answers; choose: another selection than the model's."""
    own = model.choose
    model.choose = own if isinstance(choose, str) else choose
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float((answers(model, scenes).argmax(-1) == scenes.answer).double().mean())
    finally:
        model.choose = own


def only(regions: Tensor, *, others: bool = False) -> Choose:
    """Selects one region of each scene, or all the others. regions: `[n]`."""

    def choose(layer: int, preference: Tensor) -> Tensor:
        chosen = nn.functional.one_hot(regions, preference.shape[-1]).bool()
        return (~chosen if others else chosen)[:, None].expand_as(preference)

    return choose


@torch.no_grad()
def selections(model: SceneMagnifier, scenes: CoarseToFine) -> Tensor:
    """`[n, layers, c]` regions that the row of the answer selects."""
    own, seen = model.choose, []
    inner = own or model._choose

    def choose(layer: int, preference: Tensor) -> Tensor:
        chosen = inner(layer, preference)
        seen.append(chosen[:, -1])
        return chosen

    model.choose = choose
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            answers(model, scenes)
    finally:
        model.choose = own
    return torch.stack(seen, 1)


@dataclass
class Trained:
    """What was measured. accuracy: arm -> "detail"/"kind" and the number of regions, as "detail 16".

    found: of an arm, share of the questions for a detail whose region some layer selects; other: the same for a region
    that was not asked for. read: share of the fine keys that the answer's row reads, mean over layers. parts: the
    magnifier with fine keys or coarse tokens taken away, the all-fine arm with regions taken away. plugged: after
    tuning the coarse arm with and without a magnifier. seen: share of the rooms' objects that tokens show.
    """

    model: SceneMagnifier
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)
    read: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    plugged: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)


def tests(seed: int, count: int = SCENES) -> dict[int, CoarseToFine]:
    return {size: coarse_to_fine_scene(count, regions=size, seed=900_000 + 10 * seed + size) for size in (LARGE, SMALL)}


def measure_arm(made: Trained, arm: str, model: SceneMagnifier, scenes: dict[int, CoarseToFine]) -> None:
    sizes = [(what, size) for what in (DETAIL, KIND) for size in scenes]
    made.accuracy[arm] = {f"{what} {size}": accuracy(model, questions(scenes[size], what)) for what, size in sizes}
    large = questions(scenes[LARGE], DETAIL)
    chosen = selections(model, large)
    item = torch.arange(len(large))
    made.found[arm] = float(chosen.any(1)[item, large.asked].double().mean())
    made.other[arm] = float(chosen.any(1)[item, (large.asked + 1) % LARGE].double().mean())
    made.read[arm] = float(chosen.double().mean())


def measure_parts(made: Trained, magnifier: SceneMagnifier, whole: SceneMagnifier, scenes: CoarseToFine) -> None:
    detail, kind = questions(scenes, DETAIL), questions(scenes, KIND)
    blank = lambda x: CoarseToFine(**{**vars(x), "coarse": torch.zeros_like(x.coarse)})  # noqa: E731
    made.parts |= {
        "no fine, detail": accuracy(magnifier, detail, nothing),
        "no fine, kind": accuracy(magnifier, kind, nothing),
        "no coarse, detail": accuracy(magnifier, blank(detail)),
        "no coarse, kind": accuracy(magnifier, blank(kind)),
        "all fine, only asked": accuracy(whole, detail, only(detail.asked)),
        "all fine, others": accuracy(whole, detail, only(detail.asked, others=True)),
    }


def plug_in(coarse: SceneMagnifier, seed: int, arm: str, steps: int = PLUG_STEPS) -> SceneMagnifier:
    """A copy of the model that learned coarse tokens only, tuned."""
    return train(magnifying(coarse), arm, 1000 + seed, steps, PLUG_RATE)


def rooms_seen(seed: int, count: int = 8) -> dict[str, float]:
    """Share of the objects of cross-room scenes that some token shows: within 0.6 m, mostly of that name."""
    found: dict[str, list[bool]] = {"coarse": [], "fine": []}
    for scene in cross_room_scenes(count, rooms=3, objects=4, points=24, seed=seed):
        tokens = scene_tokens(scene.points[None], scene.features[None], coarse=36, coarse_size=24, fine=4, around=48)
        for name, features, centers in (
            ("coarse", tokens.coarse[0], tokens.centers[0]),
            ("fine", tokens.fine[0], tokens.fine_centers[0]),
        ):
            found[name] += _shown(scene.objects, features, centers)
    return {name: sum(row) / len(row) for name, row in found.items()}


def _shown(objects: Any, features: Tensor, centers: Tensor) -> Iterator[bool]:
    from headwise.tasks.cross_rooms import OBJECTS

    for one in objects:
        near = (centers - torch.tensor(one.center)).norm(dim=-1) < 0.6
        yield bool((near & (features[:, OBJECTS.index(one.name)] > 0.75)).any())


def train_all(run: Run, steps: int = STEPS, plug_steps: int = PLUG_STEPS, count: int = SCENES) -> Trained:
    scenes, models = tests(run.seed, count), {}
    base = train(build(run.seed), COARSE, 2000 + run.seed, min(steps, BASE_STEPS), details=0.0)
    run.log("base: trained")
    for arm in ARMS:
        # From the base, all fine tokens at once are not learned in as many steps: the control gets twice as many.
        start = models[MAGNIFIER] if arm == ALL else magnifying(base)
        models[arm] = train(copy.deepcopy(start), arm, run.seed, steps)
        run.log(f"{arm}: trained")
    made = Trained(models[MAGNIFIER])
    for arm, model in models.items():
        measure_arm(made, arm, model, scenes)
    measure_parts(made, models[MAGNIFIER], models[ALL], scenes[LARGE])
    for name, arm in ((PLUGGED, MAGNIFIER), (UNPLUGGED, COARSE)):
        tuned = plug_in(models[COARSE], run.seed, arm, plug_steps)
        made.plugged[name] = accuracy(tuned, questions(scenes[LARGE], DETAIL))
        run.log(f"{name}: tuned")
    made.seen = rooms_seen(run.seed)
    return made
