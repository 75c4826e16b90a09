"""The run of visual attention redistribution: rows whose numbers can be told beforehand, and how each fails."""

from pathlib import Path

import pytest
import torch

from headwise.papers import _visual_redistribution_rows as rows
from headwise.papers._picture_runs import Scores, at_cells, caption_inputs, random_cells, scored
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.vision_language import IMAGE
from headwise.tasks.captions import shapes_captions

FEW = 96


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(
        find_paper("visual-attention-redistribution"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None
    )


@pytest.fixture(scope="module")
def its(run) -> rows.Subject:
    """The models, with few pictures."""
    whole = rows.subject(run)
    return rows.Subject(whole.plain, whole.sunk, whole.counterfactual[:FEW], whole.ordinary[:FEW])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", FEW)


def test_cells_are_places_of_the_prompt():
    scenes = shapes_captions(3, empty=rows.SINKS, seed=1)
    ids = caption_inputs(scenes)["input_ids"]
    found = at_cells(rows._object_cells(scenes), ids)
    assert found.nonzero()[:, 1].view(3, 4).tolist() == (scenes.cells + 1).tolist()
    assert not (found & (ids != IMAGE)).any()
    drawn = random_cells(torch.tensor([2, 0, 4]), 0, rows._object_cells(scenes))
    assert drawn.sum(1).tolist() == [2, 0, 4] and not (drawn & ~rows._object_cells(scenes)).any()


def test_exactly_the_implanted_sinks_are_found_and_none_before(run, its, few):
    massive, detector = rows.massive(run, its)
    assert detector.holds and detector.values == {"precision": 1.0, "recall": 1.0}
    assert not massive.holds and massive.values["largest max |x| / RMS(x)"] < 6
    lost = rows.Subject(its.plain, its.plain, its.counterfactual, its.ordinary)
    assert not rows.massive(run, lost)[1].holds, "a model without sinks fails the check"


def test_nothing_happens_without_a_sink_and_the_edit_is_the_rule(its, few, monkeypatch):
    assert rows.nothing(its).holds
    found = rows.definition(its)
    assert found.holds and found.values["relative difference"] < 1e-9
    monkeypatch.setattr(rows, "TRANSFER", 0.5)
    later = rows.redistribute_attention

    def other(*args, **options):
        return later(*args, **{**options, "transfer": 0.7})

    monkeypatch.setattr(rows, "redistribute_attention", other)
    assert not rows.definition(its).holds, "another transfer is another edit"


def test_attention_goes_from_the_sinks_to_the_other_image_tokens(run, its, few, monkeypatch):
    found = rows.focus(run, its)
    assert found.holds and found.values["rise on other image tokens"] > 0
    monkeypatch.setattr(rows, "TRANSFER", 0.0)
    assert rows.focus(run, its).values["rise on other image tokens"] == 0


def test_hiding_the_sinks_is_not_hiding_shapes(run, its, few):
    base = scored(its.sunk, its.counterfactual)
    found = rows.removable(run, its, base)
    assert found.values["attention ratio"] > 5 and found.values["loss of hiding objects"] > 0.05
    swapped = rows.Subject(its.sunk, its.plain, its.counterfactual, its.ordinary)
    assert not rows.removable(run, swapped, scored(its.plain, its.counterfactual)).holds, "no sink, no high attention"


def test_what_is_given_back_is_counted_from_the_loss(run):
    def flat(value: float) -> Scores:
        return Scores(*(torch.full((64,), value) for _ in range(3)))

    found = {"no sinks": flat(0.6), "sinks implanted": flat(0.4), "VAR": flat(0.55), "random heads": flat(0.45)}
    row = rows.restores(run, {**found, "all heads": flat(0.4)})
    assert row.holds and row.values["share given back, VAR"] == pytest.approx(0.75)
    assert row.values["share given back, random heads"] == pytest.approx(0.25)
    assert not rows.restores(run, {**found, "VAR": flat(0.45)}).holds
    assert not rows.restores(run, {**found, "no sinks": flat(0.4)}).holds, "nothing was lost"
    centric = rows.centric(run, {**found, "all heads": flat(0.5)})
    assert centric.holds and centric.margin == pytest.approx(0.05)


def test_random_heads_are_as_many(its, few):
    """The control moves as much attention in as many rows, in other heads."""
    from headwise.hf.maps import attention_maps
    from headwise.hf.session import steer

    part = its.counterfactual[:8]
    inputs = caption_inputs(part)
    plain = attention_maps(its.sunk, inputs, heads="1.*")
    changed = []
    for edits in ([its.var(layers=[1])], rows._shuffled(its, 0)(part, 0)):
        with steer(its.sunk, *edits):
            maps = attention_maps(its.sunk, inputs, heads="1.*")
        changed.append((maps - plain).abs().amax(-1) > 1e-6)
    assert not torch.equal(changed[0], changed[1])
    few, many = changed[1].sum(1), changed[0].sum(1)  # a random head may have nothing on the sinks to move
    assert 0 < 0.8 * int(many.sum()) < int(few.sum()) < 1.05 * int(many.sum())  # a row near 1e-6 counts in one alone


def test_the_figure_is_drawn(run):
    from headwise.papers import visual_attention_redistribution as paper

    scores = Scores(*(torch.rand(16) for _ in range(3)))
    names = ("no sinks", "sinks implanted", "VAR", "VAR, transfer 0.4", "all heads", "random heads", "to all keys")
    paper._draw(run, dict.fromkeys(names, scores))
    assert Path(run.figures[-1]).stat().st_size > 10_000
