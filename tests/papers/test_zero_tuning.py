"""The run of zero-tuning: rows that hold by algebra, rows whose numbers can be told beforehand, and how each fails."""

import math
from pathlib import Path

import pytest
import torch

from headwise.attend.edits import BiasGroup
from headwise.attend.groups import positions
from headwise.attend.head_map import HeadMap
from headwise.hf.addresses import layout
from headwise.papers import _zero_tuning_rows as rows
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.prompts import symbol_prompts
from headwise.specimens.registry import load_specimen
from headwise.steering.search import HeadSearch
from headwise.steering.zero_tuning import scale_initial_token


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("zero-tuning"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def subject() -> rows.Subject:
    """Three tasks of the tasks model, with few prompts."""
    names = ("needles", "addition")
    batches = symbol_prompts(rows.CALIBRATION + rows.HELD_OUT + 16, 0, needle_size=8, tasks=names)
    return rows.Subject.of("tasks", load_specimen("tasks").model, batches, "needles")


def windows() -> torch.Tensor:
    specimen = load_specimen("text")
    ids = specimen.tokenizer(
        "The old man gave Anna a book, and Anna gave the old man a pen. Then Anna went home to read."
    )
    return torch.tensor([ids["input_ids"][:20]])


def test_the_formulas_hold_on_a_trained_model():
    sharpens, entropy = rows.weights(load_specimen("text").model, windows())
    assert sharpens.values["largest error"] < 1e-10 and "0 change in the wrong direction" in sharpens.measured
    assert entropy.holds and entropy.values["largest difference"] < 1e-10


def test_the_formulas_do_not_hold_of_another_token(monkeypatch):
    def second_token(gamma, heads):
        return BiasGroup(positions([1]), math.log(gamma), heads=heads)

    monkeypatch.setattr(rows, "ZeroTuning", second_token)
    sharpens, entropy = rows.weights(load_specimen("text").model, windows())
    assert not sharpens.holds and sharpens.values["largest error"] > 1e-3
    assert not entropy.holds


def test_the_bias_is_the_scaled_and_renormalised_weight(monkeypatch):
    model, ids = load_specimen("text").model, windows()
    form, composition = rows.forms(model, ids)
    assert form.holds and composition.holds and "is bit-identical" in form.measured
    monkeypatch.setattr(
        rows, "scale_initial_token", lambda weights, gamma: scale_initial_token(weights, gamma, index=1)
    )
    assert not rows.forms(model, ids)[0].holds


def test_a_long_lever_belongs_to_a_sink(run):
    row = rows.control_point(run, [])
    assert row.holds and row.values["ratio, backcopy"] > 3
    assert "backcopy@0" in (row.control or "") and "backcopy@0" not in row.measured


def test_kinds_of_heads_are_told_apart():
    noise = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    up = ((noise[0] - 1).tolist(), (noise[1] + 1).tolist())  # the loss falls with a larger gamma
    down = ((noise[2] + 1).tolist(), (noise[3] - 1).tolist())
    both = ((noise[4] - 1).tolist(), (noise[5] - 1).tolist())  # falls either way: neither kind
    nothing = (noise[6].tolist(), noise[7].tolist())
    assert rows._kinds([up, down, both, nothing, up], 0) == (2, 1)
    assert rows._kinds([both, nothing], 0) == (0, 0)


def test_each_group_has_its_own_gamma(subject, run):
    row, table = rows.better_token(run, [subject])
    assert set(table) == {"needles", "addition"} and rows.FIRST in table["needles"] and rows.RANDOM in table["needles"]
    rivals = [name for name in table["needles"] if name not in (rows.FIRST, rows.RANDOM)]
    assert len(rivals) == 1 and rivals[0] in subject.held_out["needles"].groups
    gain = [numbers[rows.FIRST] for numbers in table.values()]
    assert row.values["first token"] == pytest.approx(sum(gain) / 2, abs=1e-6)
    assert row.margin is not None and row.interval is not None and row.interval[0] <= row.margin <= row.interval[1]


def test_layers_are_scaled_one_by_one(subject, run):
    row, sizes = rows.layers(run, [subject])
    depth = layout(subject.model).main.layers
    assert list(sizes) == ["tasks"] and len(sizes["tasks"]) == depth and all(size >= 0 for size in sizes["tasks"])
    falls = rows.rank_correlation(list(range(depth)), sizes["tasks"])
    assert row.values["rank correlation, tasks"] == pytest.approx(falls)
    half = depth // 2
    assert row.holds == (falls < -0.5 and sum(sizes["tasks"][:half]) > sum(sizes["tasks"][-half:]))


@pytest.mark.parametrize(("gain", "common", "holds"), [(1.0, 0.0, True), (0.0, 1.0, False), (-1.0, -1.0, False)])
def test_improving_means_over_the_plain_model_and_over_one_gamma(subject, run, monkeypatch, gain, common, holds):
    def found(model, score, held_out, *, heads, draws, seed):
        assert len(score()) == rows.CALIBRATION and len(held_out()) == 16  # chosen and measured on other prompts
        places = layout(model)
        scores = HeadMap({"gain": {head: 0.0 for head in places.heads()}}, places)
        return HeadSearch(
            heads[:1], scores, 2.0, gain, torch.full((16,), gain), torch.zeros(20), torch.full((16,), common)
        )

    monkeypatch.setattr(rows, "tune_initial_token", found)
    row = rows.improves(run, [subject])
    assert row.holds == holds and row.values["gain"] == gain
    assert "least entropy picks gamma" in (row.control or "")  # the spec's row without labels


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path):
    from headwise.papers import zero_tuning

    paper = find_paper("zero-tuning")
    run = Run(paper, 0, "cpu", tmp_path)
    measured = zero_tuning.reproduce(run)
    assert set(measured) == {row.id for row in paper.claims if row.kind != "untestable"}
    assert run.figures[0].exists()
