"""The run of davit: its task is what it is said to be, and each row can hold and fail."""

import pytest
import torch

from headwise.papers import _davit_rows as rows
from headwise.papers import _davit_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(find_paper("davit"), 0, "cpu", tmp_path, say=lambda text: None)


def trained(pair=(0.99, 0.99), spatial=(0.58, 1.0), channel=(0.52, 0.87)) -> dict[str, setup.Trained]:
    """(global, local) of the three pairs."""
    given = zip((rows.BOTH, rows.SPATIAL, rows.CHANNEL), (pair, spatial, channel), strict=True)
    return {name: setup.Trained(local, whole, 18658, (0,), (0.5,)) for name, (whole, local) in given}


def test_labels_are_what_they_are_said_to_be():
    cells, labels = setup.grids(5, torch.Generator().manual_seed(0))
    assert cells.shape == (5, 12, 12, 4) and bool((cells[..., 3].sum((1, 2)) == 1).all())
    for number in range(5):
        flagged = cells[number, ..., 3].nonzero()[0].tolist()
        colour = cells[number, flagged[0], flagged[1], 0]
        for y in range(12):
            for x in range(12):
                assert labels[number, y, x, 0] == float(cells[number, y, x, 0] == colour)
                top, left = y // 4 * 4, x // 4 * 4
                assert labels[number, y, x, 1] == cells[number, top : top + 4, left : left + 4, 2].max()
    share = setup.grids(400, torch.Generator().manual_seed(1))[1].mean((0, 1, 2))
    assert abs(float(share[0]) - 0.5) < 0.02 and abs(float(share[1]) - (1 - 0.955**16)) < 0.03


def test_pairs_have_the_same_parameters():
    assert {sum(p.numel() for p in setup.Pair(kinds).parameters()) for kinds in setup.PAIRS.values()} == {18_658}


def test_reach_of_untrained_blocks():
    assert (setup.reach("s", 0), setup.reach("c", 0), setup.reach("sc", 0)) == (25, 256, 256)


def test_a_few_steps_of_training(run):
    found = setup.train_pairs(run, steps=3)
    assert list(found) == [rows.BOTH, rows.SPATIAL, rows.CHANNEL] and found[rows.BOTH].steps == (0,)
    rows.draw(run, found)
    assert run.figures[0].stat().st_size > 10_000


def test_trained_rows_hold_and_fail(run):
    assert rows.channel_is_global(run, trained()).holds and rows.spatial_refines(trained()).holds
    for change in ({"pair": (0.96, 0.99)}, {"spatial": (0.71, 1.0)}):
        assert not rows.channel_is_global(run, trained(**change)).holds
    for change in ({"pair": (0.99, 0.96)}, {"channel": (0.52, 0.94)}, {"channel": (0.95, 0.9)}):
        assert not rows.spatial_refines(trained(**change)).holds
    assert rows.global_and_efficient(run, trained()).holds
    assert not rows.global_and_efficient(run, trained(pair=(0.9, 1.0))).holds


def test_counted_rows_hold_and_fail(run, monkeypatch):
    for row in (rows.orthogonal(run), rows.linear(), rows.parameters(), rows.operations()):
        assert row.holds, row.measured
    monkeypatch.setattr(rows, "multiply_adds", lambda model, size: size**2.2)
    assert not rows.linear().holds and not rows.operations().holds
    monkeypatch.setitem(rows.PARAMETERS, "tiny", (28_360_169, "28.3"))
    assert not rows.parameters().holds


def test_one_cycle_rises_and_falls():
    rate = [setup.one_cycle(step, 100) for step in range(100)]
    assert rate[0] == pytest.approx(0.04) and max(rate) == pytest.approx(1.0) and rate[-1] < 0.01
    assert rate.index(max(rate)) == 30
