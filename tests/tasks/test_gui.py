"""Points, hits, modes and thresholds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.gui import (
    calibrate_threshold,
    click_accuracy,
    cross_label_modes,
    label_modes,
    read_point,
    switch_curve,
)


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("125 875", (0.125, 0.875)),
        ("(0, 1000)", (0.0, 1.0)),
        ("<|box_start|>(125,375)<|box_end|>", (0.125, 0.375)),
        ("click(x=12.5, y=400)", (0.0125, 0.4)),
        ("(100,200),(300,400)", (0.2, 0.3)),
        ("", None),
        ("over there", None),
        ("125", None),
        ("1 2 3", None),
        ("125 1001", None),
        ("-1 20", None),
        ("x1 y2", None),
    ],
)
def test_a_point_is_read_or_is_none(text, point):
    assert read_point(text) == point


def test_pixels_of_a_resized_picture_are_shares_of_its_sides():
    box = (300, 90, 420, 180)  # in the original, 1200 x 600; the model saw 616 x 308
    middle = ((box[0] + box[2]) / 2 * 616 / 1200, (box[1] + box[3]) / 2 * 308 / 600)
    point = read_point(f"({middle[0]:.1f}, {middle[1]:.1f})", (616, 308))
    assert point is not None
    assert click_accuracy([point], [box], sizes=[(1200, 600)]).right.all()
    # Taken as thousandths the same text points elsewhere: scales must not be mixed.
    wrong = read_point(f"({middle[0]:.1f}, {middle[1]:.1f})")
    assert not click_accuracy([wrong], [box], sizes=[(1200, 600)]).right.any()
    assert read_point("617 20", (616, 308)) is None


def test_borders_are_inside():
    box = [0.25, 0.5, 0.5, 0.75]
    inside = [(0.25, 0.5), (0.5, 0.75), (0.25, 0.75), (0.3, 0.6)]
    outside = [(0.2499, 0.6), (0.5001, 0.6), (0.3, 0.4999), (0.3, 0.7501), None]
    found = click_accuracy([*inside, *outside], [box] * 9)
    assert found.right.tolist() == [True] * 4 + [False] * 5
    assert found.unread == 1 and found.sample_mean == pytest.approx(4 / 9)
    pixels = click_accuracy([*inside, *outside], [[100, 100, 200, 150]] * 9, sizes=[(400, 200)] * 9)
    assert torch.equal(pixels.right, found.right)


def test_means_over_groups_and_over_samples_differ():
    points = [(0.5, 0.5)] * 3 + [(0.9, 0.9)]
    found = click_accuracy(points, [[0.4, 0.4, 0.6, 0.6]] * 4, groups=["mobile/text"] * 3 + ["web/icon"])
    assert found.groups == {"mobile/text": 1.0, "web/icon": 0.0} and found.counts == {"mobile/text": 3, "web/icon": 1}
    assert (found.sample_mean, found.group_mean) == (0.75, 0.5)


def test_turned_boxes_and_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"box 1 is \[0.5, 0.1, 0.4, 0.2\]; expected x1 <= x2"):
        click_accuracy([None, None], [[0, 0, 1, 1], [0.5, 0.1, 0.4, 0.2]])
    with pytest.raises(ValueError, match="2 points, 1 boxes"):
        click_accuracy([None, None], [[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="0 points"):
        click_accuracy([], torch.zeros(0, 4))
    with pytest.raises(ValueError, match="3 groups"):
        click_accuracy([None], [[0, 0, 1, 1]], groups=["a", "b", "c"])


def by_heart(boxes: torch.Tensor, features: torch.Tensor):
    """A model that knows its training samples by heart: it says where the nearest of them was."""

    def fit(train: torch.Tensor):
        def answer(held_out: torch.Tensor) -> list[tuple[float, float]]:
            near = train[torch.cdist(features[held_out], features[train]).argmin(1)]
            middle = (boxes[near, :2] + boxes[near, 2:]) / 2
            return [(float(x), float(y)) for x, y in middle]

        return answer

    return fit


def test_modes_are_labelled_by_models_that_have_not_seen_the_samples():
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 4, (60, 2), generator=generator) / 4
    boxes = torch.cat([corner, corner + 0.25], 1)
    features = torch.randn(60, 3, generator=generator)  # tell nothing about where
    fit = by_heart(boxes, features)
    everything = torch.arange(60)
    assert not label_modes(fit(everything)(everything), boxes).any()  # all look fast to a model that knows them
    slow = cross_label_modes(fit, boxes, folds=3)
    assert slow.double().mean() > 0.8
    seen = torch.zeros(60, dtype=torch.bool)
    seen[:5] = True
    with pytest.raises(ValueError, match="trained on 5 of 60 samples, which would look fast"):
        label_modes(fit(everything)(everything), boxes, trained_on=seen)
    with pytest.raises(ValueError, match="folds is 1"):
        cross_label_modes(fit, boxes, folds=1)


def test_cross_labels_hold_out_every_sample_once():
    held = []

    def fit(train: torch.Tensor):
        def answer(out: torch.Tensor) -> list[None]:
            assert not set(train.tolist()) & set(out.tolist()) and len(train) + len(out) == 11
            held.extend(out.tolist())
            return [None] * len(out)

        return answer

    assert cross_label_modes(fit, [[0, 0, 1, 1]] * 11, folds=4, seed=3).all()
    assert sorted(held) == list(range(11))


outcomes = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=30)


@given(outcomes)
def test_the_curve_is_what_each_threshold_gives(rows):
    p = torch.tensor([row[0] / 8 for row in rows])
    fast, slow = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    price = 10.0 + torch.arange(len(rows))
    curve = switch_curve(p, fast, slow, cost_fast=4.0, cost_slow=price)
    assert (curve.thresholds.diff() > 0).all() and (curve.slow_rate.diff() <= 0).all()
    assert curve.thresholds[0] == 0 and curve.thresholds[-1] == 1
    for theta, rate, accuracy, cost in zip(curve.thresholds, curve.slow_rate, curve.accuracy, curve.cost, strict=True):
        chosen = (p > theta) | (theta == 0)
        assert float(rate) == pytest.approx(float(chosen.double().mean()))
        assert float(accuracy) == pytest.approx(float(torch.where(chosen, slow, fast).double().mean()))
        assert float(cost) == pytest.approx(float(torch.where(chosen, price, 4.0).double().mean()))


@given(outcomes, st.sampled_from([0.0, 0.05, 0.5]))
def test_no_threshold_is_worth_more_than_the_calibrated_one(rows, cost):
    p = torch.tensor([row[0] / 8 for row in rows])
    fast, slow = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])

    def worth(theta: float) -> float:
        chosen = (p > theta) | (theta <= 0)
        return float(torch.where(chosen, slow, fast).double().mean() - cost * chosen.double().mean())

    best = calibrate_threshold(p, fast, slow, cost)
    assert worth(best) == pytest.approx(max(worth(k / 16) for k in range(17)))


def test_a_dear_slow_answer_is_not_taken_and_a_needed_one_is():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])  # uncalibrated: all below a half
    fast, slow = torch.tensor([True, True, False, False]), torch.tensor([True] * 4)
    assert 0.2 <= calibrate_threshold(p, fast, slow, 0.05) < 0.3
    assert calibrate_threshold(p, fast, slow, 2.0) == 1.0
    with pytest.raises(ValueError, match="cost is -1"):
        calibrate_threshold(p, fast, slow, -1)
    with pytest.raises(ValueError, match="give probabilities"):
        switch_curve(p + 1, fast, slow)
    with pytest.raises(ValueError, match="3 correct_fast"):
        switch_curve(p, fast[:3], slow)
