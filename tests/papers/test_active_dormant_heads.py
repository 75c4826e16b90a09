"""The run of active-dormant-heads: its measurements on tiny budgets, and its oracles."""

from pathlib import Path

import pytest
import torch

from headwise.papers import active_dormant_heads as paper
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture
def toy(tmp_path: Path) -> "paper._Toy":
    return paper._Toy(Run(find_paper("active-dormant-heads"), 0, "cpu", tmp_path, say=lambda text: None))


def test_the_generated_text_copies_after_every_trigger(toy):
    row = paper._generator(toy)
    assert row.holds and row.measured.startswith("1.0000 of")


def test_a_state_is_measured_on_the_right_rows(toy):
    """A model that parks every row on BOS: sink 1, and nothing on the token before."""
    model = toy.train("a few steps", steps=2, hold="value")
    state = toy.measure(model, instead="first")
    assert state.sink_other == state.sink_trigger == [1.0]
    assert state.before_trigger == [0.0]
    assert state.drain[0] == pytest.approx(1.0, abs=1e-3)


def test_the_trigger_mark_decides_the_split(toy):
    model = toy.train("a few steps", steps=2, hold="value")
    none, every = torch.zeros_like(toy.seen).bool(), torch.ones_like(toy.seen).bool()
    assert toy.measure(model, rows=every).sink_trigger[0] == pytest.approx(toy.measure(model, rows=none).sink_other[0])


def test_no_model_beats_the_truth(toy):
    model = toy.train("a few steps", steps=30, hold="value")
    losses = toy.measure(model).losses
    assert losses["excess"] >= 0 and losses["trigger"] >= 0


def test_checkpoints_are_kept_of_the_unchanged_model_only(toy):
    toy.train("changed", steps=2, hold="value")
    assert not toy.along
    toy.train("unchanged", steps=101)
    assert sorted(toy.along) == [0, 100]


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path):
    run = Run(find_paper("active-dormant-heads"), 0, "cpu", tmp_path)
    rows = paper.reproduce(run)
    assert set(rows) == {claim.id for claim in find_paper("active-dormant-heads").claims if claim.kind != "untestable"}
    assert run.figures[0].exists()
