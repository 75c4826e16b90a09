"""The run of dual-cross-attention: each row can hold and fail, and what the rows are made from is right."""

from dataclasses import replace

import pytest
import torch

from headwise.papers import _dual_cross_rows as rows
from headwise.papers import _dual_cross_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.tasks.digits import digit_images
from headwise.tasks.reidentification import identity_images

RIGHT = {
    "baseline": 0.80,
    "baseline, twice": 0.81,
    "GLCA": 0.82,
    "GLCA, mean": 0.82,
    "GLCA, mean, random": 0.81,
    "PWCA": 0.88,
    "DCAL": 0.89,
}


def results(**changes: float) -> setup.Results:
    right = RIGHT | changes
    digits = {
        (size, arm): setup.Recognised(value, value - 0.01, 1.0)
        for size in setup.BACKBONES
        for arm, value in right.items()
    }
    plain = setup.Found(0.5, 0.5, 0.7, background=0.6, entropy=0.9, parts=2.0)
    dual = replace(plain, both=0.55, background=0.5, entropy=0.95, parts=2.5)
    people = {(size, arm): one for size in setup.BACKBONES for arm, one in (("baseline", plain), ("DCAL", dual))}
    return setup.Results(digits, people, identity_images(range(1)), dict.fromkeys(right, 1.0))


def test_glca_asks_for_a_point_and_for_more_than_random_queries():
    assert rows.glca(results()).holds
    assert not rows.glca(results(baseline=0.815)).holds
    assert not rows.glca(results(**{"GLCA, mean, random": 0.82})).holds


def test_pwca_asks_for_three_points_equal_cost_and_a_smaller_gap():
    assert rows.pwca(results()).holds
    assert not rows.pwca(results(PWCA=0.825)).holds
    assert not rows.pwca(results(**{"baseline, twice": 0.89})).holds
    found = results()
    found.digits["large", "baseline"].trained_on = 0.8
    assert not rows.pwca(found).holds


@pytest.mark.parametrize("change", [{"background": 0.6}, {"entropy": 0.9}, {"parts": 2.0}])
def test_attention_asks_for_all_three(change):
    found = results()
    assert rows.attention(found).holds
    found.people["large", "DCAL"] = replace(found.people["large", "DCAL"], **change)
    assert not rows.attention(found).holds


def test_every_baseline_must_improve():
    found = results()
    assert rows.consistent(found).holds and rows.reidentification(found).holds
    found.people["small", "DCAL"] = replace(found.people["small", "DCAL"], both=0.505)
    assert not rows.consistent(found).holds and not rows.reidentification(found).holds


def test_self_alone_may_lose_two_points():
    found = results()
    assert rows.self_alone(found).holds
    found.digits["large", "DCAL"].alone = 0.86
    assert not rows.self_alone(found).holds


def test_costs_are_counted():
    row = rows.cost()
    assert row.holds and row.measured.startswith("483,848 parameters (+8.5%)")
    assert row.values["class"] < row.values["operations"] < row.values["with the rollout"]


def test_arms_of_a_seed_start_alike_and_differ_as_named():
    arms = {arm: setup.wrapped("digits", "small", arm, 3) for arm in setup.ARMS}
    first = arms[setup.PLAIN].backbone.state_dict()
    for name, arm in arms.items():
        assert all(torch.equal(value, first[key]) for key, value in arm.backbone.state_dict().items()), name
    assert [len(arms[name].local_blocks) for name in (setup.PLAIN, setup.PAIR, setup.LOCAL, setup.DUAL)] == [0, 0, 1, 1]
    assert arms[setup.RANDOM].config.selection == "random" and arms[setup.DUAL].config.pwca
    assert setup.wrapped("people", "small", setup.DUAL, 0).config.objective == "reidentification"


def test_shares_of_parts():
    parts = torch.zeros(1, 24, 12, dtype=torch.long)
    parts[0, :3, :3] = 2
    parts[0, 3, 0] = 4
    shares = setup.part_shares(parts)
    assert shares.shape == (1, 32, 5) and shares[0, 0].tolist() == [0, 0, 1, 0, 0]
    torch.testing.assert_close(shares[0, 4], torch.tensor([8 / 9, 0, 0, 0, 1 / 9]))  # four patches in a row of the grid


def test_where_an_even_response_lies():
    torch.manual_seed(0)
    model = setup.wrapped("people", "small", setup.PLAIN, 0)
    model.responses = lambda images: torch.ones(len(images), 32)  # pyright: ignore[reportAttributeAccessIssue]
    data = identity_images(range(6), per_camera=2)
    one = setup.found(model, data)
    assert one.entropy == pytest.approx(1.0)
    assert one.background == pytest.approx(float((data.parts == 0).double().mean()), abs=1e-5)
    assert 0 < one.both < 1


def test_training_learns_the_digits_and_rows_come_from_models(monkeypatch, tmp_path):
    monkeypatch.setitem(setup.STEPS, "digits", 200)
    data = digit_images(200)
    model = setup.trained("digits", "small", setup.DUAL, setup.digit_batches(data, 32), 0, "cpu")
    one = setup.recognised(model, data)
    assert one.trained_on > 0.3 and one.both > 0.3
    found = results()
    found.digits["large", "DCAL"] = one
    assert rows.pairs_vanish(found).holds
    run = Run(find_paper("dual-cross-attention"), 0, "cpu", tmp_path, say=lambda text: None)
    response = torch.full((8, 32), 1 / 32)
    for key, value in found.people.items():
        found.people[key] = replace(value, responses=response)
    rows.draw(run, found)
    assert run.figures[0].stat().st_size > 10_000
