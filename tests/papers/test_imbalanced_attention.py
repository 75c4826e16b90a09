"""The run of imbalanced attention: rows whose numbers can be told beforehand, and how each fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.papers import _imbalanced_rows as rows
from headwise.papers._picture_runs import Scores
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.vision_language import next_shapes, written_captions
from headwise.steering.imbalanced_attention import ImageTokenBoost
from headwise.tasks.hallucination import Chair

FEW = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("imbalanced-attention"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def its(run) -> rows.Subject:
    whole = rows.subject(run)
    parts = (whole.counterfactual[:FEW], whole.ordinary[:FEW])
    return rows.Subject(whole.model, *parts, whole.scale, whole.local[:FEW], whole.summary[:FEW])


@pytest.fixture(scope="module")
def said(its) -> rows.Written:
    return rows.written(its)


def scores(typical: float, accuracy: float = 0.5) -> Scores:
    return Scores(torch.full((FEW,), accuracy), torch.full((FEW,), typical), torch.full((FEW,), 0.7))


def test_tokens_and_factors(its):
    assert not (its.local & its.summary).any()
    assert ((its.local | its.summary).sum(1) >= 4).all() and (its.local.sum(1) <= 4).all()
    assert its.scale.shape == (4, 8) and float(its.scale.min()) == 0 and float(its.scale.max()) == 1


def test_what_was_written_is_read_at_the_rows_that_said_it(its, said):
    """Texts are those of the specimen's own generation; a row is the one before its word."""
    assert said.texts == written_captions(its.model, its.counterfactual)
    first = rows.ID[rows.SHAPE_WORDS[0]]
    b, t = said.rows.nonzero().unbind(1)
    words = said.ids[b, t + 1] - first
    assert ((words >= 0) & (words < 8)).all()
    here = its.counterfactual.present[b, words]
    assert torch.equal(here, ~said.wrong[b, t]) and not (said.wrong & ~said.rows).any()
    assert [int(x) for x in said.rows.sum(1)] == [
        sum(word in rows.SHAPE_WORDS for word in text.split()) for text in said.texts
    ]
    assert (said.place[b, t] >= 0).all() and int(said.place.max()) <= 3


def test_attention_on_the_picture_is_that_of_whole_maps(its, said):
    from headwise.hf.maps import attention_maps

    found = rows.image_mass(its, said, said.rows)
    inputs = {"input_ids": said.ids[:8], "pixel_values": its.counterfactual[:8].pixel_values}
    maps = attention_maps(its.model, inputs).view(8, 4, 8, said.ids.shape[1], -1)
    mass = maps[..., 1:17].sum(-1).mean(2)  # n l t
    chosen = said.rows[:8, None]
    torch.testing.assert_close(found[:8], (mass * chosen).sum(-1) / chosen.sum(-1), atol=1e-5, rtol=1e-4)


def test_the_identities_hold_and_can_fail(its, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", FEW)
    assert rows.neutral(its).holds and rows.odds(its).holds

    def twice(alpha, **options):
        return ImageTokenBoost(2 * alpha, **options)

    monkeypatch.setattr(rows, "ImageTokenBoost", twice)
    assert not rows.odds(its).holds


def test_the_method_raises_attention_on_the_picture(run, its, said):
    found, series = rows.maintains(run, its, said)
    assert found.holds and all(b > a for a, b in zip(series["plain"], series["under the method"], strict=True))


def test_random_tokens_are_as_many(its):
    edit: Any = rows._random_tokens(its, 3)(its.counterfactual, 0)[0]
    assert edit.local_group is not None and edit.summary_group is not None
    from headwise.attend.step import Step

    step = Step.of(FEW, 30)
    local, summary = (group.members(step) for group in (edit.local_group, edit.summary_group))
    assert torch.equal(local.sum(1), its.local.sum(1)) and torch.equal(summary.sum(1), its.summary.sum(1))
    assert not (local & summary).any() and not local[:, 17:].any() and not local[:, 0].any()


def test_rows_from_known_answers(run, its):
    better = {"plain": scores(0.5), "informed tokens, all heads": scores(0.3), "random tokens, all heads": scores(0.4)}
    better |= {"all tokens, all heads": scores(0.2)}
    row = rows.selection(run, its, better)
    assert row.values["lead over random tokens"] == pytest.approx(0.1)
    assert not rows.selection(run, its, {**better, "random tokens, all heads": scores(0.31)}).holds
    heads = {
        "full": scores(0.3),
        "random heads": scores(0.4),
        "even heads": scores(0.35),
        "insensitive heads": scores(0.2),
    }
    assert rows.modulation(run, heads).margin == pytest.approx(0.05)
    assert not rows.modulation(run, {**heads, "even heads": scores(0.29)}).holds


def test_grounding_counts_what_is_lost_on_ordinary_pictures(run, its, monkeypatch):
    found = {"plain": scores(0.5, 0.3), "full": scores(0.3, 0.5)}
    chair = Chair(0.5, 0.3, 0.7, 4.0)
    kept = iter([scores(0.0, 0.9), scores(0.0, 0.89)])
    monkeypatch.setattr(rows, "scored", lambda *args: next(kept))
    assert rows.grounding(run, its, found, chair).holds
    lost = iter([scores(0.0, 0.9), scores(0.0, 0.8)])
    monkeypatch.setattr(rows, "scored", lambda *args: next(lost))
    row = rows.grounding(run, its, found, chair)
    assert not row.holds and row.margin == pytest.approx(-0.08, abs=1e-6)


def test_degrading_is_told_by_both_its_parts(run, its, said):
    row, layers = rows.degrades(run, its, said)
    assert set(layers) == {"all shapes", "wrong shapes", "right shapes"} and len(layers["all shapes"]) == 4
    assert set(row.values) == {"fall with depth", "gap in the deeper half"}
    margin = min(row.values.values())
    assert row.margin == pytest.approx(margin) and row.holds == (margin >= 0)
    measured, chair = rows.hallucinates(run, its, said)
    assert measured.values["CHAIR_s"] == pytest.approx(float(said.wrong.any(1).float().mean()))
    assert chair.length > 3


def test_the_figure_is_drawn(run):
    from headwise.papers import imbalanced_attention as paper

    layers = {"all shapes": [0.1, 0.2, 0.3, 0.4], "wrong shapes": [0.1] * 4, "right shapes": [0.2] * 4}
    places = {"plain": [0.4, 0.3, 0.2, 0.1], "under the method": [0.5] * 4}
    paper._draw(run, layers, places, {"plain": scores(0.3), "full": scores(0.2)})
    assert Path(run.figures[-1]).stat().st_size > 10_000


def test_the_specimen_answers_as_it_does_alone(its):
    found = rows.scored(its.model, its.counterfactual)
    said = next_shapes(its.model, its.counterfactual)
    expected = (said[:, 1:] == its.counterfactual.shapes[:, 1:]).float().mean(1)
    assert torch.equal(found.accuracy, expected)
