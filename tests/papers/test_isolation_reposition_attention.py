"""The run of isolation-reposition-attention: worlds and conditions are what is said of them; rows hold and fail."""

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="extra diffusion: diffusers is not installed")

from headwise.papers import _isolation_rows as rows
from headwise.papers import _isolation_setup as setup
from headwise.papers._isolation_setup import (
    APART,
    IR,
    ISOLATE,
    MASACTRL,
    MASKS,
    MISPLACED,
    NONE,
    NUMBERS,
    RANDOM,
    REPOSITION,
    RIVALS,
    SWAPPED,
    Looks,
    Painter,
    Trained,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.tasks.subject_consistency import draw_subjects

N = 6


@pytest.fixture(scope="module")
def painters() -> dict[str, Painter]:
    torch.manual_seed(0)
    return {kind: Painter(kind).eval() for kind in setup.KINDS}


def test_targets_are_the_same_whatever_the_place():
    near, far, anywhere = (setup.draw_group(N, 3, 5, place) for place in ("near", "far", "any"))
    assert torch.equal(near.subjects, far.subjects) and torch.equal(near.noise, anywhere.noise)
    assert torch.equal(near.references, near.subjects)
    apart = (_middle(far.references) - _middle(far.subjects)).abs().amax(-1)
    middle = (_middle(far.subjects) // 3 == 1).all(-1)
    assert bool((apart[~middle] >= 3).all()) and not (far.references & far.subjects).any()
    assert torch.equal(far.references.sum((-2, -1)), far.subjects.sum((-2, -1))), "of the same size"
    assert torch.equal(far.reference_inside.sum((-2, -1)), far.inside.sum((-2, -1))), "of the same shape"


def _middle(masks: torch.Tensor) -> torch.Tensor:
    """The top left token of each mask."""
    return torch.stack([masks.any(-1).int().argmax(-1), masks.any(-2).int().argmax(-1)], -1)


def test_a_batch_is_references_and_then_the_target():
    group = setup.draw_group(N, 3, 5, "any")
    words = group.prompts.cells.view(N, 4, -1)
    assert bool((words[:, :3, 0] >= 0).all()) and bool((words[:, :3, 1:] == -1).all())
    assert bool((words[:, 3, :3] >= 0).all()) and bool((words[:, 3, 3:] == -1).all())
    turned = group.swapped()
    assert torch.equal(turned.prompts.cells.view(N, 4, -1)[:, 1, 0], words[:, 0, 0])
    assert torch.equal(turned.prompts.cells.view(N, 4, -1)[:, 3], words[:, 3])
    assert torch.equal(turned.noise.view(N, 4, -1)[:, 1], group.noise.view(N, 4, -1)[:, 0])
    assert torch.equal(turned.references[:, 1], group.references[:, 0])
    alone = group.targets()
    assert torch.equal(alone.prompts.cells, words[:, 3]) and len(alone.noise) == N


def test_random_masks_are_as_large_and_disjoint():
    group = setup.draw_group(N, 4, 5, "any")
    mixed = setup.shuffled(group.subjects, 0)
    assert torch.equal(mixed.sum((-2, -1)), group.subjects.sum((-2, -1))) and int(mixed.sum(1).max()) == 1
    assert not torch.equal(mixed, group.subjects)


def test_prompts_reach_the_networks(painters):
    scenes = draw_subjects(3, torch.Generator().manual_seed(0), subjects=(2, 2))
    prompts = setup.Prompts.of(scenes)
    text = painters["rotary"].text(prompts)
    for i in range(3):
        for j in range(2):
            said = (
                painters["rotary"].shape.weight[scenes.shapes[i, j]]
                + painters["rotary"].size.weight[scenes.sizes[i, j]]
            )
            torch.testing.assert_close(text[i, scenes.cells[i, j]], said)
    assert int((text == painters["rotary"].nothing).all(-1).sum()) == 3 * 7
    assert int((painters["unet"].text(prompts) == painters["unet"].nothing).all(-1).sum()) == 3 * 3
    places = painters["rotary"].words.view(3, 3, 3)
    assert places[1, 2].tolist() == [0, 4, 7]
    x = torch.randn(3, 12, 9, 9)
    for painter in painters.values():
        with torch.no_grad():
            out = painter(x, torch.full((3,), 0.5), prompts)
        assert out.shape == x.shape and torch.isfinite(out).all()
    torch.testing.assert_close(setup.to_images(setup.to_tokens(scenes.images)), scenes.images)


@pytest.mark.parametrize("kind", setup.KINDS)
def test_networks_learn(kind):
    first = Painter(kind)
    batch = setup.scene_batch(0, torch.Generator().manual_seed(99))
    learned = setup.train_painter(kind, 0, 25)
    with torch.no_grad():
        before, after = (float(setup.flow_loss(one, batch)) for one in (first, learned))
    assert after < 0.5 * before


def test_a_perfect_network_is_painted_in_any_number_of_steps():
    scenes = draw_subjects(2, torch.Generator().manual_seed(0))
    clean = setup.to_tokens(scenes.images)
    perfect: Any = lambda x, t, prompts: clean  # noqa: E731
    for steps in (1, 7):
        made = setup.paint(perfect, setup.Prompts.of(scenes), torch.randn(clean.shape), steps)
        torch.testing.assert_close(made, scenes.images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", setup.KINDS)
def test_conditions_change_targets_and_never_references(painters, kind, monkeypatch):
    monkeypatch.setattr(setup, "EULER", 2)
    group = setup.draw_group(2, 2, 5, "far")
    plain = setup.painted(painters[kind], NONE, group)
    made = {}
    for how in (*setup.MANY[1:], REPOSITION, MISPLACED, SWAPPED):
        made[how] = setup.painted(painters[kind], how, group, plain)
        torch.testing.assert_close(made[how][:, :2], plain[:, :2], atol=1e-4, rtol=1e-3)
        assert not torch.equal(made[how][:, 2], plain[:, 2]), how
        assert not painters[kind].network._forward_pre_hooks
    if kind == "rotary":
        assert not torch.allclose(made[REPOSITION], made[MISPLACED], atol=1e-4)
        assert not torch.allclose(made[REPOSITION], made[MASKS], atol=1e-4)


def looked(own: float, other: float = 0.0, distance: float = 1.0, n: int = 16) -> Looks:
    wobble = 0.02 * torch.linspace(-1, 1, n)
    return Looks(own + wobble, other + wobble, own + wobble, distance + wobble, torch.zeros(n, 3, 3, 2, 2))


def trained(changes: dict[tuple[str, Any, str], Looks] | None = None) -> Trained:
    """Figures under which every row holds, but those changed."""
    made = Trained({})
    own = {NONE: 0.0, MASKS: 0.2, ISOLATE: 0.3, IR: 0.4} | dict.fromkeys(RIVALS, 0.25)
    for number in NUMBERS:
        for how in setup.MANY:
            value = own.get(how, 0.1) - (0.04 * number if how in RIVALS else 0.0)
            apart = 1.1 if how in (ISOLATE, IR, APART) else 0.8
            made.looks["unet", number, how] = looked(value, distance=apart)
        made.apart[number] = torch.full((16,), 1.2)
    for kind, place in ((kind, place) for kind in setup.KINDS for place in rows.PLACES):
        near = kind == "unet" or place == "near"
        for how in setup.ROTARY_FAR:
            value = {NONE: 0.0, MASKS: 0.3 if near else 0.1, REPOSITION: 0.3, IR: 0.3}.get(how, 0.1)
            made.looks[kind, place, how] = looked(value)
    made.looks |= changes or {}
    return made


def everywhere(how: str, **figures: Any) -> dict[tuple[str, Any, str], Looks]:
    return {("unet", number, how): looked(**figures) for number in NUMBERS}


def test_rows_hold_and_fail():
    good = trained()
    assert rows.key_idea(good).holds and not rows.key_idea(trained(everywhere(MASKS, own=-0.1))).holds
    fallen = {("rotary", place, MASKS): looked(-0.1) for place in rows.PLACES}
    assert not rows.key_idea(trained(fallen)).holds
    assert rows.numerous(good).holds
    flat = {key: looked(0.25 + 0.01 * key[1]) for how in RIVALS for key in everywhere(how, own=0.0)}
    assert not rows.numerous(trained(flat)).holds
    assert (
        rows.interference(good).holds and not rows.interference(trained(everywhere(RANDOM, own=0, distance=1.2))).holds
    )
    assert not rows.interference(trained(everywhere(APART, own=0, distance=0.7))).holds
    assert rows.nearby(good).holds
    assert not rows.nearby(trained({("rotary", "far", MASKS): looked(0.35)})).holds
    assert rows.consistency(good).holds
    assert not rows.consistency(trained({("rotary", "far", REPOSITION): looked(0.15)})).holds
    assert not rows.consistency(trained({("rotary", "far", REPOSITION): looked(0.05)})).holds
    assert rows.outperforms(good).holds and not rows.outperforms(trained(everywhere(MASACTRL, own=0.5))).holds


def test_isolation_closes_half_of_the_gap_and_stops_every_gradient(painters, monkeypatch):
    made = trained()
    made.painters = painters
    monkeypatch.setattr(rows, "paint", lambda painter, prompts, noise, steps: setup.paint(painter, prompts, noise, 1))
    assert rows.crossing(made, ISOLATE) == 0.0 and rows.crossing(made, MASKS) > 0
    assert rows.isolation(made).holds
    narrow = trained(everywhere(ISOLATE, own=0, distance=0.9))
    narrow.painters = painters
    assert not rows.isolation(narrow).holds
    monkeypatch.setattr(rows, "crossing", lambda made, how: 1e-9)
    assert not rows.isolation(made).holds


def test_the_other_rows(painters, monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "EULER", 2)
    made = trained()
    made.painters = painters
    run = Run(find_paper("isolation-reposition-attention"), 0, "cpu", tmp_path)
    assert rows.same_place(run).holds and rows.definition(run).holds
    same = rows.resampling(made)
    assert same.holds and same.values["unet"] <= 1e-4
    made.painters = {"unet": painters["rotary"], "rotary": painters["unet"]}
    assert not rows.resampling(made).holds
    made.painters = painters
    free = rows.training_free(made)
    assert free.values["references"] <= 1e-3
    for (_, place, _), one in made.looks.items():
        one.pictures = torch.zeros(16, 3 if isinstance(place, str) else place + 1, 3, 18, 18)
    made.looks["unet", 3, IR].pictures[1, -1] = 1.0
    rows.draw(run, made)
    assert run.figures[0].stat().st_size > 10_000
    found = rows.samples(made, ("unet", 3), (NONE, IR), [0, 1])
    assert found.shape == (2 * 19, 5 * 19, 3)
    assert found[19:37, 4 * 19 : 4 * 19 + 18].min() == 1 and found[:18, :18].max() == 0.5
