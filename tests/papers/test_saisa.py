"""The run of SAISA: its tasks are what they are said to be, its networks start alike, each row can hold and fail."""

import copy
from typing import Any

import pytest
import torch

from headwise.papers import _saisa_rows as rows
from headwise.papers import _saisa_setup as setup
from headwise.papers._saisa_setup import ARMS, BLIND, LLAVA, NAAVIT, NAMING, SAISA, TWICE, UNTRAINED, Trained

NAMED = {NAMING: 0.9, TWICE: 0.8, "naming, first word": 0.7, "naming, counterfactual": 0.5}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: model.eval() for name, model in setup.networks(0).items()}


def trained(models: dict[str, Any], **changes: dict[str, float]) -> Trained:
    made = Trained(models)
    made.scores = {name: NAMED | changes.get(name, {}) for name in (*ARMS, UNTRAINED, BLIND)}
    made.seconds = {LLAVA: 0.09, NAAVIT: 0.08, SAISA: 0.07}
    return made


def test_arms_start_from_the_same_weights(models: dict[str, Any]):
    states = {name: model.state_dict() for name, model in models.items()}
    assert states[LLAVA].keys() == states[NAAVIT].keys()
    shared = [name for name in states[LLAVA] if "multi_modal_projector" not in name]
    for arm in (NAAVIT, SAISA):
        assert all(torch.equal(states[arm][name], states[LLAVA][name]) for name in shared)
    for name, value in states[SAISA].items():
        if "multi_modal_projector" in name:
            first, second, third, *rest = name.split(".")[1:]
            assert (first, third) == ("multi_modal_projector", "linear_1") or third == "linear_2"
            assert torch.equal(value, states[LLAVA][".".join(["model", first, third, *rest])]), second
    assert len({model.lm_head.weight.data_ptr() for model in models.values()}) == 3


def test_one_shape_occurs_twice():
    scenes, answer = setup.twice_scenes(50, torch.Generator().manual_seed(0))
    for shapes, twice in zip(scenes.shapes.tolist(), answer.tolist(), strict=True):
        assert shapes.count(twice) == 2 and len(set(shapes)) == 3
    assert len(set(answer.tolist())) > 4


def test_batches_take_turns_and_labels_are_the_words():
    generator = torch.Generator().manual_seed(0)
    naming, twice = (setup.batches(step, generator) for step in (0, 1))
    assert naming[0].shape == (setup.BATCH, 18 + 8) and twice[0].shape == (setup.BATCH, 18 + 1)
    for ids, pixels in (naming, twice):
        assert pixels.shape == (setup.BATCH, 3, 32, 32)
        assert ids[:, 1:17].eq(setup.IMAGE).all() and not ids[:, 17:].eq(setup.IMAGE).any()
    assert naming[0][:, 17].eq(setup.DESCRIBE).all() and twice[0][:, 17].eq(setup.ASK_TWICE).all()
    assert naming[0][:, -1].eq(setup.EOS).all() and naming[0][:, 19].eq(setup.COMMA).all()


def test_scores_are_what_is_said_word_by_word(models: dict[str, Any]):
    held = setup.tests(0, 8)
    model = models[SAISA]
    found = setup.scores(model, held)
    ids, pixels = setup.naming_ids(held.naming), held.naming.pixel_values
    right = []
    for row in range(8):
        for place in (18, 20, 22, 24):
            with torch.no_grad():
                given = {"input_ids": ids[row : row + 1, :place], "pixel_values": pixels[row : row + 1]}
                right.append(bool(model(**given).logits[0, -1].argmax() == ids[row, place]))
    assert found[NAMING] == pytest.approx(sum(right) / len(right))
    assert found["naming, first word"] == pytest.approx(sum(right[::4]) / 8)
    other = setup.tests(1, 8)
    assert not torch.equal(other.naming.shapes, held.naming.shapes)


def test_training_lowers_the_loss(models: dict[str, Any]):
    history = setup.train(copy.deepcopy(models[SAISA]), 0, steps=16)
    assert sum(history.losses[-4:]) < 0.9 * sum(history.losses[:4])


def test_what_networks_do(models: dict[str, Any]):
    held = setup.tests(0, 4).naming
    ids, pixels = setup.naming_ids(held), held.pixel_values
    moved = {name: rows.moved(model, ids, pixels, 0) for name, model in models.items()}
    assert moved[LLAVA] > 100 * max(moved[NAAVIT], moved[SAISA])
    reached = {name: rows.reach(models[name], ids, pixels) for name in (LLAVA, NAAVIT)}
    assert reached[NAAVIT] == 0 < reached[LLAVA]
    assert 0 <= rows.apart(models[SAISA], ids, pixels) < 1e-5
    assert {model.config.implementation for model in models.values()} == {"auto"}
    broken = copy.deepcopy(models[NAAVIT])
    for layer in broken.model.language_model.layers:
        layer.self_attn._forward_hooks.clear()
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(64))
    assert rows.apart(broken, ids, pixels) > 1e-4, "image rows that take an update are noticed"


def test_rows_hold_and_fail(models: dict[str, Any]):
    good = trained(models)
    assert rows.redundant(good).holds
    assert not rows.redundant(trained(models, **{NAAVIT: {TWICE: 0.77}})).holds
    assert not rows.redundant(trained(models, **{NAAVIT: {NAMING: 0.87}})).holds
    assert not rows.accuracy(good).holds, "a tie is not superior"
    assert rows.accuracy(trained(models, **{SAISA: {NAMING: 0.92}})).holds
    assert not rows.accuracy(trained(models, **{SAISA: {NAMING: 0.92, TWICE: 0.7}})).holds
    assert rows.naming(good).holds and not rows.naming(trained(models, **{SAISA: {NAMING: 0.87}})).holds
    assert rows.efficient(good).holds
    good.seconds[SAISA] = 0.1
    assert not rows.efficient(good).holds


def test_exact_rows(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    made = trained(models)
    for row in (rows.interactions(made, 0), rows.eliminates(made, 0), rows.counted(made), rows.same_rows(made, 0)):
        assert row.holds
    swapped = trained({**models, NAAVIT: models[LLAVA]})
    assert not rows.interactions(swapped, 0).holds and not rows.eliminates(swapped, 0).holds
    monkeypatch.setattr(rows, "prefill_flops", lambda *sizes: 1)
    assert not rows.counted(made).holds


def test_costs_at_full_size(monkeypatch: pytest.MonkeyPatch):
    for row in (rows.both_blocks(), rows.inference(), rows.budget(), rows.trade_off()):
        assert row.holds
    assert rows.inference().values["saved, 64 text tokens"] == pytest.approx(0.665, abs=0.001)
    monkeypatch.setattr(rows, "TEXT", 128)
    assert not rows.inference().holds
    monkeypatch.setattr(rows, "CONVERSATION_TEXT", 4096)
    assert not rows.budget().holds
