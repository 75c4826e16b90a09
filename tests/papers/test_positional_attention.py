"""The run of positional-attention: its rows on made-up errors, its setup, and short training."""

import pytest
import torch

from headwise.models import PositionalConfig, PositionalTransformer
from headwise.papers import _positional_rows as rows
from headwise.papers import _positional_setup as setup
from headwise.papers._positional_setup import POSITIONAL, RANGES, ROPE, STANDARD, TRAINED, Fitted
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(find_paper("positional-attention"), 0, "cpu", tmp_path, say=lambda text: None)


def found(ours: float = 1e-3, ratio: float = 20.0, rope: float = 20.0):
    """Errors that grow with the range like the variance, 100 times the square of the multiple over 100."""

    def fitted(kind: str, factor: float) -> Fitted:
        model = PositionalTransformer(PositionalConfig(attention=kind)).eval()
        return Fitted(model, {m: factor * m * m for m in RANGES}, {m: 1.0 * m * m for m in RANGES})

    factor = {POSITIONAL: ours, STANDARD: ours * ratio, ROPE: ours * rope}
    return {(kind, task): fitted(kind, factor[kind]) for kind, tasks in TRAINED.items() for task in tasks}


def test_rows_hold_and_fail_by_their_criteria():
    assert rows.out_of_distribution(found()).holds and rows.rope(found()).holds
    assert not rows.out_of_distribution(found(ratio=9.0)).holds  # too close to the standard
    assert not rows.out_of_distribution(found(ours=0.02)).holds  # did not learn
    assert not rows.rope(found(rope=9.0)).holds
    far = found()
    for task in ("sum", "min"):
        far[POSITIONAL, task].errors[10] = 6.0
        far[STANDARD, task].errors[10] = 600.0
    assert not rows.out_of_distribution(far).holds  # beats the standard far away, and is wrong there all the same
    right = {"standard, 2 layers": 0.95, "positional, 2 layers": 0.5, "positional, 4 layers": 0.6}
    assert rows.recall(right).holds and rows.recall(right).margin == pytest.approx(0.05)
    assert not rows.recall(right | {"positional, 2 layers": 0.8}).holds


def hopped(standard: float, ours: float, far: float | None = None):
    """Shares of the variance: the same in all ranges, but at 10 times the range."""

    def fitted(kind: str, share: float, far: float) -> Fitted:
        model = PositionalTransformer(PositionalConfig(attention=kind)).eval()
        shares = dict.fromkeys(RANGES, share) | {10: far}
        return Fitted(model, {m: 4.0 * one for m, one in shares.items()}, dict.fromkeys(RANGES, 4.0))

    return {
        POSITIONAL: fitted(POSITIONAL, ours, ours if far is None else far),
        STANDARD: fitted(STANDARD, standard, 1.0),
    }


def test_pointers_are_lost_by_position_where_the_standard_learned_them(run):
    assert rows.hops(hopped(0.01, 0.4), run).holds
    assert not rows.hops(hopped(0.06, 0.4), run).holds  # the standard did not learn
    assert not rows.hops(hopped(0.04, 0.03, 0.9), run).holds  # attention by position wins
    assert not rows.hops(hopped(0.01, 0.03), run).holds  # as right in far ranges as on sums
    assert rows.hops(hopped(0.01, 0.04, 0.06), run).margin == pytest.approx(0.2)
    guess = rows.hops(hopped(0.01, 0.4), run).values["the list's mean: MSE over variance"]
    assert guess == pytest.approx(7 / 8, abs=0.03)


def test_rows_without_training(run):
    assert rows.parallel_algorithms(run).holds and rows.official_rope(run).holds
    assert rows.positions_only(found()).holds


def test_lists_of_a_wider_range_are_never_of_the_training_range():
    assert setup.wider_lists(1, 0).abs().max() <= 2
    assert 2 < setup.wider_lists(3, 0).abs().max() <= 6
    assert not torch.equal(setup.wider_lists(3, 0), setup.wider_lists(3, 1))
    assert setup.wider_hops(1, 0).numbers.abs().max() <= 2 < setup.wider_hops(3, 0).numbers.abs().max() <= 6


def test_tasks_are_trained_together_each_on_its_own_answers():
    """A few steps: errors fall on both, and the two networks differ."""
    untrained = setup.fit_tasks(POSITIONAL, ("sum", "min"), 3, steps=1)
    learned = setup.fit_tasks(POSITIONAL, ("sum", "min"), 3, steps=60)
    for task in ("sum", "min"):
        assert learned[task].errors[1] < untrained[task].errors[1]
    first, second = (learned[task].model.encode.weight for task in ("sum", "min"))
    assert not torch.equal(first, second)


def test_recall_is_trained_on_the_last_token():
    assert 0 <= setup.fit_recall(STANDARD, 1, 0, steps=2) < 0.4


def test_pointers_are_trained_on_every_place():
    untrained, learned = (setup.fit_hops(STANDARD, 0, steps=steps) for steps in (1, 80))
    assert learned.errors[1] < untrained.errors[1]
    assert learned.variances[10] > 20 * learned.variances[1]


def test_the_picture_is_drawn(run):
    rows.draw(run, found(), hopped(0.01, 0.4))
    assert run.figures[-1].stat().st_size > 10_000
