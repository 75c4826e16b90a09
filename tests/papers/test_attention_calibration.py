"""The run of attention-calibration: how sinks are counted, rows that hold by algebra, and how each row fails."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwise.attend.head_map import HeadMap
from headwise.attend.received import mean_received
from headwise.attend.step import Step
from headwise.hf.addresses import layout
from headwise.papers import _calibration_rows as rows
from headwise.papers import _calibration_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.prompts import backcopy_prompts, prose_prompts
from headwise.specimens.registry import load_specimen
from headwise.steering.attention_calibration import calibrate_sinks
from headwise.steering.search import HeadSearch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("attention-calibration"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(setup, "PROMPTS", 12)
    monkeypatch.setattr(setup, "PROSE", 12)


@pytest.fixture
def backcopy() -> setup.Task:
    return setup.Task.of("backcopy", load_specimen("backcopy-deep").model, backcopy_prompts(12))


@pytest.fixture
def captions() -> setup.Task:
    return setup.pictures(12, 0)[0]


def long_text() -> Tensor:
    prompts = prose_prompts(load_specimen("text").tokenizer, 2, 0, length=112)
    return prompts.input_ids.flatten()[None, prompts.input_ids.eq(2).sum() : rows.WINDOW]


def test_a_hidden_sink_is_above_both_thresholds_and_seen_by_many_rows():
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :8] = False
    received = torch.zeros(2, 1, 1, 40)
    received[:, 0, 0, [0, 8, 12, 24, 25, 39]] = 0.14
    received[0, 0, 0, 20] = 0.11  # above 0.1, below 5 / 40
    found = rows.hidden(received, real)[:, 0, 0]
    # 24 is seen by 16 rows and 25 by 15; of the padded text 8 is the first token, and 5 / 32 is above 0.14.
    assert found[0].nonzero().flatten().tolist() == [8, 12, 24]
    assert not found[1].any()
    received[1] *= 2
    assert rows.hidden(received, real)[1, 0, 0].nonzero().flatten().tolist() == [12, 24]


def test_shuffling_takes_the_sinks_away_and_leaves_the_rows(monkeypatch, captions):
    b, t = captions.held_out.input_ids.shape
    planted = torch.ones(t, t).tril()
    planted[5:, 5] = 30  # a column that all later rows look at
    planted = (planted / planted.sum(-1, keepdim=True)).expand(b, 3, t, t)
    seen: list[Tensor] = []

    def noted(maps: Tensor, real: Tensor) -> Tensor:
        seen.append(maps)
        return mean_received(maps, real)

    monkeypatch.setattr(rows, "attention_maps", lambda model, given: planted)
    monkeypatch.setattr(rows, "mean_received", noted)
    real = captions.held_out.real
    assert int(rows.hidden(mean_received(planted, real)[:, None], real).sum()) == 3 * b
    assert float(rows.shuffled(captions, 0).sum()) < 3 * b / 4
    moved = seen[0]
    torch.testing.assert_close(moved.sum(-1), torch.ones(b, 3, t))
    assert (moved.triu(1) == 0).all()
    torch.testing.assert_close(moved.sort(-1).values, planted.sort(-1).values)


def test_answers_are_counted_whole_or_token_by_token(captions, backcopy):
    logits = captions.model(**captions.inputs(captions.held_out)).logits
    batch = captions.held_out
    words = batch.input_ids[:, -5:]
    assert captions.held_out.asked[0].nonzero().flatten().tolist() == [batch.input_ids.shape[1] - i for i in (5, 3, 1)]
    own = logits[:, [-6, -4, -2]].argmax(-1) == words[:, [0, 2, 4]]
    torch.testing.assert_close(captions.accuracy(batch)(), own.float().mean(1))
    whole = replace(captions, whole=True)
    assert torch.equal(whole.accuracy(batch)(), own.all(1).float())


def test_pictures_belong_to_their_half(captions):
    assert captions.pictures is not None and len(captions.pictures) == 12
    first, second = (captions.inputs(batch)["pixel_values"] for batch in (captions.calibration, captions.held_out))
    assert torch.equal(torch.cat([first, second]), captions.pictures)


def test_kinds_of_heads_are_told_apart():
    noise = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    assert rows._kinds([noise[0] - 3, noise[1] + 3, noise[2] + 4, torch.zeros(60)], 0) == (1, 2)
    assert rows._kinds(list(noise), 0) == (0, 0)
    assert rows._kinds([], 0) == (0, 0)


@pytest.mark.parametrize(("helps", "hurts"), [(1, 1), (0, 2), (2, 0)])
def test_sinks_hurt_needs_both_kinds(helps, hurts, run, backcopy, monkeypatch):
    monkeypatch.setattr(rows, "_kinds", lambda changed, seed: (helps, hurts))
    row, moved = rows.sinks_hurt(run, [backcopy])
    assert row.holds == (helps >= 1 and hurts >= 1)
    assert list(moved) == ["backcopy"] and set(moved["backcopy"]) == set(backcopy.heads)


def test_random_tokens_are_as_many_as_sinks(captions):
    edits = rows._random_tokens(captions, 0)
    view, real = rows.view(captions), captions.held_out.real
    step = Step(captions.held_out.input_ids, real, real, past=0, length=real.shape[1])
    assert set(edits) == {head for head in captions.heads if bool(view.found[:, head.layer, head.head].any())}
    for head, edit in edits.items():
        wanted = view.found[:, head.layer, head.head].sum(-1)
        members = edit.key_groups()[0].members(step)
        assert torch.equal(members.sum(-1), wanted)
        assert not (members & captions.held_out.asked).any() and not members[:, 0].any()


def test_other_texts_have_other_sinks(run, backcopy, captions):
    views = [rows.view(task) for task in (backcopy, captions)]
    row = rows.adaptive(run, [backcopy, captions], views)
    assert (
        row.holds
        and "0 tensors of weights change" in row.measured
        and row.control == ("the same text twice: the same sinks")
    )
    same = [replace(view, found=view.found[:1].expand_as(view.found)) for view in views]
    row = rows.adaptive(run, [backcopy, captions], same)
    assert not row.holds


@pytest.mark.parametrize(("gain", "random", "holds"), [(0.1, 0.0, True), (0.1, 0.2, False), (0.0, -0.1, False)])
def test_improving_means_over_the_plain_model_and_over_random_sets(gain, random, holds, run, backcopy, monkeypatch):
    def found(model, edit, score, held_out, *, candidates, draws, seed):
        assert len(score()) == 6 and len(held_out()) == 6 and draws == rows.DRAWS
        places = layout(model)
        scores = HeadMap({"gain": dict.fromkeys(places.heads(), 0.0)}, places)
        values = (torch.full((6,), gain), torch.full((20,), random), torch.zeros(6))
        return HeadSearch(candidates[:1], scores, None, 0.3, *values, baseline=(0.5, 0.5))

    monkeypatch.setattr(rows, "search_heads", found)
    row, searches = rows.improves(run, [backcopy])
    assert row.holds == holds and row.values["gain"] == pytest.approx(gain)
    assert row.values["gain on the prompts of the search"] == pytest.approx(0.3) and list(searches) == ["backcopy"]


def test_the_edit_is_calibrated_weights(monkeypatch):
    ids = long_text()[:, :150]  # more than one block of rows
    row = rows.forms(ids)
    assert row.holds and row.values["largest relative difference"] < 1e-8 and "is bit-identical" in row.measured
    monkeypatch.setattr(rows, "calibrate_sinks", lambda maps, sinks, beta: calibrate_sinks(maps, sinks, beta + 0.01))
    assert not rows.forms(ids[:, :40]).holds


def test_generation_is_one_forward(monkeypatch):
    ids = long_text()[:, :40]
    row = rows.decoding(ids)
    assert row.holds and row.values["largest difference"] < 1e-4
    monkeypatch.setattr(rows, "act", lambda: setup.act(statistics="prompt"))
    assert not rows.decoding(ids).holds  # the prompt's rows would be judged by what came later


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path, few):
    from headwise.papers import attention_calibration

    paper = find_paper("attention-calibration")
    run = Run(paper, 0, "cpu", tmp_path)
    measured = attention_calibration.reproduce(run)
    assert set(measured) == {row.id for row in paper.claims if row.kind != "untestable"}
    assert run.figures[0].exists()
