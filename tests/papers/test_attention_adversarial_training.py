"""The run of attention-adversarial-training: its rows on results that are known beforehand, and its oracles."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headwise.papers import _adversarial_rows as rows
from headwise.papers._adversarial_setup import (
    AT,
    IAT,
    METHODS,
    MINUS,
    RANDOM,
    SENTIMENT,
    SWEPT,
    UNIFORM,
    VANILLA,
    WORD_AT,
    WORD_IAT,
    MinusAT,
    Outcome,
    Trained,
    build,
    inputs_of,
    make_tasks,
    measure,
    train,
    uniform,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.training import AttentionAT


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(
        find_paper("attention-adversarial-training"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None
    )


@pytest.fixture(scope="module")
def tasks():
    return make_tasks(0, train=128, test=64, epochs=1)


@pytest.fixture(scope="module")
def probed(tasks, run) -> rows.Probed:
    model = train(tasks[SENTIMENT], VANILLA, 0.0, run)
    return rows.Probed.of(Trained(tasks, {}, {(SENTIMENT, VANILLA): model}, {}, {}))


def outcome(right: float, correlation: float = 0.5, **more) -> Outcome:
    """Hundred sentences with this accuracy and correlation."""
    hits = [1.0] * round(100 * right) + [0.0] * (100 - round(100 * right))
    spread = [0.1 * i / 100 for i in range(100)]
    return Outcome(
        right=hits,
        correlation=[correlation + x for x in spread],
        spread=[more.get("difference", 0.5) + x for x in spread],
        attacked=[more.get("attacked", 0.5)] * 100,
        shaken=[more.get("shaken", right)] * 100,
    )


def made_up(tasks, **changed) -> Trained:
    """A run in which everything that the abstract says is true, but for what is changed: method -> outcome."""
    good = {
        VANILLA: outcome(0.70, 0.30), UNIFORM: outcome(0.60), RANDOM: outcome(0.71, 0.31), WORD_AT: outcome(0.72, 0.35),
        WORD_IAT: outcome(0.72, 0.35), AT: outcome(0.80, 0.50, difference=0.6),
        IAT: outcome(0.90, 0.60, difference=0.8),
    }  # fmt: skip
    good |= changed
    outcomes = {(task, method): one for task in tasks for method, one in good.items()}
    outcomes[SENTIMENT, rows.STRONG] = outcome(0.75, attacked=0.70)
    outcomes[SENTIMENT, rows.NOISE] = outcome(0.70, attacked=0.55)
    outcomes[SENTIMENT, MINUS] = outcome(0.65, 0.7)
    flat, steep = [0.8, 0.8, 0.81, 0.8, 0.8], [0.8, 0.8, 0.7, 0.6, 0.5]
    sweep = {AT: flat, IAT: flat, WORD_AT: steep, WORD_IAT: steep}
    return Trained(tasks, outcomes, {}, sweep, dict.fromkeys(SWEPT, 1.0))


def test_every_row_holds_where_the_abstract_is_true(tasks, run):
    found = made_up(tasks)
    for row in (
        rows.vulnerable(found),
        rows.robust(found),
        rows.performance(found, run),
        rows.interpretability(found, run),
        rows.boosts(found, run),
        rows.nine_of_ten(found),
        rows.all_tasks(found),
        rows.perturbation_size(found),
    ):
        assert row.holds, row.measured
        assert row.interval is None or row.interval[0] > 0
    assert rows.vulnerable(found).margin == pytest.approx(0.1)
    assert rows.robust(found).margin == pytest.approx(0.06)
    assert rows.perturbation_size(found).margin == pytest.approx(0.14)


def test_every_row_fails_where_it_is_not(tasks, run):
    assert not rows.vulnerable(made_up(tasks, **{VANILLA: outcome(0.70, shaken=0.55)})).holds  # noise does it too
    assert not rows.vulnerable(made_up(tasks, **{VANILLA: outcome(0.70, attacked=0.65)})).holds
    assert not rows.vulnerable(made_up(tasks, **{UNIFORM: outcome(0.71)})).holds
    worse = made_up(tasks, **{AT: outcome(0.65, 0.25)})
    assert not rows.performance(worse, run).holds and not rows.interpretability(worse, run).holds
    assert not rows.all_tasks(worse).holds
    assert not rows.boosts(made_up(tasks, **{IAT: outcome(0.9, 0.6, difference=0.5)}), run).holds
    assert not rows.nine_of_ten(made_up(tasks, **{WORD_AT: outcome(0.9)})).holds  # shares the first place
    assert not rows.nine_of_ten(made_up(tasks, **{AT: outcome(0.95)})).holds  # AT leads, not iAT
    weak = made_up(tasks)
    weak.outcomes[SENTIMENT, rows.STRONG] = outcome(0.75, attacked=0.58)
    assert not rows.robust(weak).holds  # 3 points over noise
    weak.outcomes[SENTIMENT, rows.STRONG] = outcome(0.68, attacked=0.68)
    assert not rows.robust(weak).holds  # clean accuracy is lost
    weak.sweep[IAT] = [0.8, 0.65, 0.8, 0.8, 0.8]
    assert not rows.perturbation_size(weak).holds  # a range of exactly half of that of words


def test_a_gain_within_the_noise_is_inconclusive(tasks, run):
    found = made_up(tasks)
    near = replace(outcome(0.70), right=found.outcomes[SENTIMENT, VANILLA].right[::-1])
    row = rows.performance(made_up(tasks, **{AT: near}), run)
    assert row.margin == pytest.approx(0) and row.interval is not None and row.interval[0] < 0 < row.interval[1]


def test_oracles_hold_on_a_trained_model(probed):
    for row in (
        rows.first_order(probed),
        rows.sign(probed),
        rows.row_normalised(probed),
        rows.globally_normalised(probed),
    ):
        assert row.holds, row.measured


def test_oracles_fail_for_another_method(probed, monkeypatch):
    """With the released sign, or with AT in place of iAT, the checks do not pass."""
    monkeypatch.setattr(rows, "AttentionAT", MinusAT)
    assert not rows.sign(probed).holds and not rows.row_normalised(probed).holds
    monkeypatch.setattr(rows, "AttentionAT", lambda model, eps=1.0, mode="at": AttentionAT(model, eps=eps))
    assert not rows.globally_normalised(probed).holds


@pytest.mark.parametrize("method", [*METHODS, UNIFORM, MINUS])
def test_every_method_trains_from_the_same_start(tasks, run, method):
    task = tasks["questions"]
    model = train(task, method, 2.0, run)
    start, plain = build(task, run.seed), train(task, VANILLA, 0.0, run)
    here, there, then = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, start, plain))
    assert torch.isfinite(here).all() and not torch.equal(here, there)
    assert torch.equal(here, then) == (method == VANILLA)


def test_what_is_measured_of_a_model(tasks, run):
    task = tasks[SENTIMENT]
    model = train(task, VANILLA, 0.0, run)
    found = measure(model, task.test, run)
    logits = model(**inputs_of(task.test, "cpu")).logits[:, 0]
    assert found.accuracy == pytest.approx(float(((logits > 0).long() == task.test.clean).double().mean()))
    assert found.accuracy >= sum(found.attacked) / 64
    assert 0 < found.mass < 1 and all(-1 <= r <= 1 for r in found.correlation)
    with uniform(model):
        even = measure(model, task.test, run)
    assert even.spread == pytest.approx([0.0] * 64, abs=1e-6)
    cues = task.test.cues.sum(1) / task.test.mask.sum(1)
    assert even.mass == pytest.approx(float(cues.mean()), abs=1e-5)


def test_every_kind_of_model_is_raised(tasks, run):
    models = {(name, VANILLA): build(task, 0) for name, task in tasks.items()}
    row = rows.general(Trained(tasks, {}, models, {}, {}), run)
    assert row.holds and row.values["raised by noise"] < 0.9


def test_the_picture_is_drawn(tasks, run):
    rows.draw(run, made_up(tasks))
    assert run.figures[-1] == Path(run.out) / "attention-adversarial-training.png"
    assert run.figures[-1].stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path, monkeypatch):
    from headwise.papers import _adversarial_setup as setup
    from headwise.papers import attention_adversarial_training as paper

    monkeypatch.setattr(setup, "make_tasks", lambda seed: make_tasks(seed, train=64, test=64, epochs=1))
    record = find_paper("attention-adversarial-training")
    measured = paper.reproduce(Run(record, 0, "cpu", tmp_path, say=lambda text: None))
    assert set(measured) == {row.id for row in record.claims if row.kind != "untestable"}
