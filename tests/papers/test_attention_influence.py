"""The run of attention-influence: its documents are what they are said to be, and each row can hold and fail."""

import math

import pytest
import torch

from headwise.papers import _influence_rows as rows
from headwise.papers._influence_setup import Arm, Selector, Told, auc, documents, make_pool
from headwise.tasks.mixture import Mixture


def told(**changes) -> Told:
    return Told(**{"score": 0.99, "zeroed": 0.98, "loss": 0.7, "others": {"2.2": 0.5}, "by_family": {}, **changes})


def arm(ends: dict[str, float], middle: float = 0.0, parameters: int = 10**6) -> Arm:
    names = (*rows.IN_POOL, *rows.ELSEWHERE)
    values = {name: [0.0, middle, ends.get(name, 0.0)] for name in names}
    return Arm(parameters, [0, 50, 100], values, {name: [1.0] * 3 for name in names})


def arms(chosen: dict[str, float], whole: dict[str, float], middle: float = 0.0) -> dict[str, Arm]:
    return {rows.WHOLE: arm(whole), rows.RANDOM: arm(whole), rows.CHOSEN: arm(chosen, middle)}


def test_auc_is_the_chance_of_the_right_order():
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 7 / 8
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


def test_plain_text_copies_nothing_back():
    found = documents(32, 20, 0)
    assert {name: tuple(ids.shape) for name, ids in found.items()} == dict.fromkeys(found, (20, 32))
    assert not bool(Mixture().text.trigger_mask(found["bigrams"]).any())
    pool = make_pool(0)
    assert len(pool.ids) == 2048 and int(pool.needed.sum()) == 1024 and pool.needed[:1024].float().mean() < 0.6


def test_effective_holds_and_fails():
    assert rows.effective(told()).holds
    for change in ({"score": 0.94}, {"loss": 0.76}, {"others": {"2.2": 0.995}}):
        assert not rows.effective(told(**change)).holds
    assert "2.2 0.500" in str(rows.effective(told()).control), "every other set is printed"


def test_improvement_asks_for_every_task():
    good: dict[str, float] = dict.fromkeys(rows.IN_POOL, 0.5)
    assert rows.improvement(arms(good, {}), rows.IN_POOL).holds
    assert not rows.improvement(arms({**good, "addition": 0.0}, {}), rows.IN_POOL).holds
    assert not rows.improvement(arms(good, {name: 0.49 for name in rows.IN_POOL}), rows.IN_POOL).holds


def test_steps_to_a_target():
    one = arm({"repeats": 0.4, "needles": 0.4}, middle=0.2)
    assert rows.steps_to(one, 0.2) == 50 and rows.steps_to(one, 0.3) == 100 and math.isinf(rows.steps_to(one, 0.5))


@pytest.mark.parametrize(("middle", "holds"), [(0.3, True), (0.0, False)])
def test_weak_to_strong_asks_for_fewer_steps(middle, holds):
    small = object.__new__(Selector)
    small.model = torch.nn.Linear(3, 3)
    ends = {"repeats": 0.5, "needles": 0.5}
    found = arms(ends, {"repeats": 0.2, "needles": 0.2}, middle)
    assert rows.weak_to_strong(small, found).holds is holds
