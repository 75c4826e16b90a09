"""The run of vision-aware head reinforcement: what each row measures, and how it fails when it should."""

from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from headwise.attend.edits import ScaleHeads
from headwise.hf.session import steer
from headwise.papers import _vision_heads_rows as rows
from headwise.papers import _vision_heads_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.vision_language import next_shapes, vision_language_inputs
from headwise.tasks.captions import shapes_captions


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    paper = find_paper("vision-aware-head-reinforcement")
    return Run(paper, 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def one(run) -> setup.Subject:
    return setup.subject(run, pictures=64)


def test_what_is_told_is_what_one_forward_tells(one):
    said = setup.told(one.model, one.other)
    assert torch.equal(said.shapes, next_shapes(one.model, one.other))
    usual = said.scenes.typical[:, :-1]
    wrong = said.shapes[:, 1:] != one.other.shapes[:, 1:]
    torch.testing.assert_close(said.typical, ((said.shapes[:, 1:] == usual) & wrong).float().mean(1))
    torch.testing.assert_close(said.right, (~wrong).float().mean(1))


def test_heads_are_chosen_at_the_end_of_the_prompt_and_kept_for_the_caption(one):
    chosen = setup.chosen_heads(one.model, one.other)
    by_edit = setup.told(one.model, one.other, setup.reinforced())
    by_hand = setup.told(one.model, one.other, setup.scaled(chosen))
    assert torch.equal(by_edit.shapes, by_hand.shapes)
    assert not torch.equal(by_edit.shapes, setup.told(one.model, one.other).shapes)


def test_random_heads_are_as_many_in_every_layer(one):
    chosen = setup.chosen_heads(one.model, one.other)[:8]
    draws = setup.random_heads(one, chosen, 0)
    assert len(draws) == setup.DRAWS
    for draw in draws:
        assert torch.equal(draw.sum(2), chosen.sum(2)) and not torch.equal(draw, chosen)
    assert not torch.equal(draws[0], draws[1])
    fixed = setup.upper_half(one)
    assert fixed.sum(1).tolist() == [0, 4, 4, 4]


def test_contrasting_with_no_strength_is_plain_writing(one):
    plain = setup.written(one.model, one.other)
    for other in ("none", "distorted"):
        assert setup.contrasted(one.model, one.other, other, strength=0.0) == plain
        assert setup.contrasted(one.model, one.other, other, strength=1.0) != plain


def test_absent_shapes_are_counted_once():
    scenes = shapes_captions(2, seed=0)  # both are disc, ring, square, cross
    assert setup.absent(["disc , hook , hook , plus", "ring , ring"], scenes).tolist() == [2.0, 0.0]


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    right, wrong = torch.randn(50, generator=generator) + 0.5, torch.randn(70, generator=generator)
    right, wrong = (x.mul(3).round() for x in (right, wrong))  # with ties
    truth, values = [1] * 50 + [0] * 70, torch.cat([right, wrong]).tolist()
    assert rows._auc(right, wrong) == pytest.approx(roc_auc_score(truth, values))


def test_positions_are_where_shapes_and_commas_are_about_to_be_said(one):
    _, shapes, commas = setup.caption_divergence(one.model, one.ordinary[:2])
    inputs = vision_language_inputs(one.ordinary[:2], [f"describe : {text}" for text in one.ordinary[:2].captions()])
    following = torch.cat([inputs["input_ids"], torch.full((2, 1), 4)], 1)[:, -8:]
    assert (following[:, shapes] >= 14).all() and (following[:, commas] == 7).all()


def test_words_owe_more_to_the_picture_where_it_tells_them(one, run, monkeypatch):
    row = rows.metric(run, one)
    assert row.holds and row.values["ratio"] > 1.3
    whole, shapes, commas = setup.caption_divergence(one.model, one.ordinary)
    monkeypatch.setattr(setup, "caption_divergence", lambda model, scenes: (whole, commas, shapes))
    assert not rows.metric(run, one).holds


def test_mitigating_needs_a_fall_and_the_right_heads(one, run, monkeypatch):
    row, table = rows.mitigates(run, one)
    assert table["VHR"]["typical"] < table["plain"]["typical"] and "ordinary" in table["VHR"]
    assert set(table) >= {"random heads", "the other half", "all heads", "no outlier rule", "one choice for all"}
    assert row.margin is not None and row.margin <= table["plain"]["typical"] - table["VHR"]["typical"] - 0.1 + 1e-9
    nothing = setup.Subject(one.model, one.ordinary, one.other, one.calibration)
    monkeypatch.setattr(setup, "reinforced", lambda alpha=2.0, **options: lambda part: ())
    failed, table = rows.mitigates(run, nothing)
    assert not failed.holds and table["VHR"]["typical"] == table["plain"]["typical"]


def test_the_identities_fail_for_another_rule(one, run, monkeypatch):
    found = rows.identities(run, one)
    assert all(row.holds for row in found.values())
    monkeypatch.setattr(rows, "aware_heads", lambda moved, gone: moved > moved.mean(-1, keepdim=True))
    assert not rows.identities(run, one)["one-forward"].holds


def test_blinding_is_of_the_heads_with_the_largest_divergence(one, run, monkeypatch):
    monkeypatch.setattr(rows, "BLIND_DRAWS", 2)
    row = rows.aware(run, one)
    table = setup.divergence_map(one).of()
    for layer in range(4):
        best = sorted(
            (head for head in table if head.layer == layer and not head.tower), key=lambda head: table[head] or 0.0
        )[-2:]
        assert all(str(head) in row.measured for head in best)
    assert row.values["lost"] > 0


def test_the_overhead_is_a_ratio_of_processor_time(run, monkeypatch):
    # Of each way: its start and its end; the ways are plain, VHR, contrast.
    seconds = iter([0.0, 10.0, 10.0, 20.5, 20.5, 40.0])
    monkeypatch.setattr(rows, "OVERHEAD_RUNS", 1)
    monkeypatch.setattr(rows, "OVERHEAD_TOKENS", 2)
    monkeypatch.setattr(rows.time, "process_time", lambda: next(seconds))
    row = rows.overhead(run)
    assert row.values["ratio"] == pytest.approx(1.05) and row.holds and "1.95 times" in (row.control or "")


def test_an_arm_for_all_pictures_is_one_edit(one):
    (edit,) = setup.scaled(torch.zeros(4, 8, dtype=torch.bool))(slice(0, 4))
    assert isinstance(edit, ScaleHeads)
    with torch.no_grad(), steer(one.model, edit):
        inputs = vision_language_inputs(one.other[:2])
        inside = one.model(**inputs).logits
    torch.testing.assert_close(inside, one.model(**inputs).logits)


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path, monkeypatch):
    from headwise.papers import vision_aware_head_reinforcement

    paper = find_paper("vision-aware-head-reinforcement")
    monkeypatch.setattr(vision_aware_head_reinforcement, "subject", lambda run: setup.subject(run, pictures=64))
    run = Run(paper, 0, "cpu", tmp_path)
    measured = vision_aware_head_reinforcement.reproduce(run)
    assert set(measured) == {row.id for row in paper.claims if row.kind != "untestable"}
    assert run.figures[0].exists()
