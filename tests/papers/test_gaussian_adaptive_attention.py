"""The run of gaussian-adaptive-attention: its rows on made-up accuracies, its measures, its fits."""

import pytest
import torch

from headwise.papers import _gaussian_rows as rows
from headwise.papers._gaussian_setup import (
    BOTH,
    BURSTS,
    COMPARED,
    CONTAMINATED,
    GAAM,
    GAAM_5,
    MEAN,
    MHA,
    MODELS,
    Trained,
    attention_received,
    auroc,
    series,
    train,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run

NAMES = {"mean": MEAN, "gaam": GAAM, "five": GAAM_5, "mha": MHA, "both": BOTH}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(find_paper("gaussian-adaptive-attention"), 0, "cpu", tmp_path, say=lambda text: None)


def found(**changed: float):
    right = {MEAN: 0.8, GAAM: 0.9, GAAM_5: 0.9, MHA: 0.85, BOTH: 0.87} | {
        NAMES[name]: value for name, value in changed.items()
    }
    sizes = {task: (series(task, 0, test=True).values.shape[2], 10) for task in COMPARED}
    return {
        (task, name): Trained(MODELS[name](*sizes[task]).eval(), right.get(name, 0.9))
        for task, names in COMPARED.items()
        for name in names
    }


def test_rows_hold_and_fail_by_their_criteria():
    good = found()
    for row in (rows.surpasses, rows.boosts, rows.across_tasks, rows.robust_pooling):
        assert row(good).holds, row
    assert rows.surpasses(good).margin == pytest.approx(0.04)
    assert not rows.surpasses(found(mha=0.895)).holds
    assert not rows.boosts(found(both=0.855)).holds
    assert not rows.across_tasks(found(mean=0.9)).holds
    assert not rows.robust_pooling(found(mean=0.87)).holds
    assert rows.collapse(good).holds and not rows.collapse(found(five=0.93)).holds


def test_a_product_fits_one_mode_and_a_sum_three():
    row = rows.any_distribution()
    assert row.values["product, one mode"] < 0.01 < 0.3 < row.values["product, two modes"]
    assert max(row.values[f"sum, {name}"] for name in rows.MODES) < 0.05
    assert not row.holds


def test_no_single_gaussian_fits_two_modes_better():
    """The fit is not to blame: the best of all centres and widths leaves as much."""
    x, target = rows.values_and_target(rows.MODES["two modes"])
    best = torch.inf
    for centre in torch.linspace(-2, 2, 41, dtype=torch.float64):
        for width in torch.linspace(0.1, 6, 60, dtype=torch.float64):
            weights = (-0.5 * ((x - centre) / width) ** 2).softmax(0)
            best = min(best, float((target * (target.clamp_min(1e-300) / weights.clamp_min(1e-300)).log()).sum()))
    assert rows.fitted(rows.MODES["two modes"], "product")[1] == pytest.approx(best, abs=0.01)


def test_importance_and_overall_use_the_same_bounds(run):
    weak = {"Importance Factor": 0.97, "attention received": 0.9, "before training": 0.9}
    assert rows._importance_margin(weak) == pytest.approx(-0.03)
    assert rows._importance_margin(weak | {"attention received": 0.5}) == pytest.approx(0.02)
    # As good before training: no metric of what was learned.
    assert rows._importance_margin(weak | {"attention received": 0.5, "before training": 0.97}) < 0
    good = found()
    area = rows.areas(good, run)
    assert area["before training"] > 0.9 and area["bursts"] < 0.4 and area["near the median"] > 0.95
    assert rows.overall(found(mha=0.95), run).holds is False


def test_underflow_is_of_the_released_form():
    assert rows.sums_to_one(32, True, draws=10) < 0.5 < rows.sums_to_one(32, False, draws=10) == 1


def test_every_modality_is_read(run):
    row = rows.modalities(run)
    assert row.holds, row.measured
    assert len(row.values) == 6


def test_area_under_the_curve():
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True])
    assert auroc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    with pytest.raises(ValueError, match="0 positives of 4"):
        auroc(scores, torch.zeros(4, dtype=torch.bool))


def test_received_attention_is_a_distribution_over_times():
    model, x = MODELS[MHA](8, 4).eval(), torch.randn(3, 64, 8)
    with torch.no_grad():
        received = attention_received(model, x)
    torch.testing.assert_close(received.sum(1), torch.ones(3))


def test_training_repeats_and_learns_two_numbers():
    one, two = (train(CONTAMINATED, GAAM, 3, steps=5) for _ in range(2))
    assert one.attention_parameters == 2 and one.accuracy == two.accuracy
    assert one.model.gaussian is not None and one.model.gaussian.offset.any()
    assert train(BURSTS, MHA, 3, steps=1).attention_parameters > 4000


def test_the_picture_is_drawn(run):
    rows.draw(run, found())
    assert run.figures[-1].stat().st_size > 10_000
