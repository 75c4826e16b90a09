"""The run of multiple-choice-circuit on a model whose one answering head was written by hand."""

from pathlib import Path

import pytest
import torch

from headwise.heads.categories import categorize_heads
from headwise.heads.knockout import live_heads
from headwise.heads.patching import activation_patch, path_patch
from headwise.hf.addresses import layout
from headwise.papers import _choice_rows as rows
from headwise.papers import _choice_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens import planted_llama
from headwise.specimens.registry import load_specimen
from headwise.tasks.choice_questions import choice_prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("multiple-choice-circuit"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def study(run) -> setup.Study:
    """The shipped model, with a quarter of the questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "PROMPTS", 64)
        return setup.Study.of(run)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(setup, "PROMPTS", 64)
    monkeypatch.setattr(setup, "DRAWS", 2)
    monkeypatch.setattr(setup, "RANKS", (0, 1, 3, 16))


def test_every_row_of_the_record_is_measured_or_untestable():
    paper = find_paper("multiple-choice-circuit")
    assert {row.kind for row in paper.claims} == {"claim", "check", "untestable"}
    assert all(row.control for row in paper.claims if row.kind != "untestable" and row.id != "attribution")


def test_the_shipped_model_answers_by_two_heads_that_look_at_the_right_label(study):
    assert [(head.layer, head.head) for head in study.letters] == [(2, 0), (2, 1)]
    for row in (rows.able(study), rows.attribution(study), rows.correct_letter(study)):
        assert row.holds, row.measured
    dead = load_specimen("choices").card["masked"]["dead"]
    assert not set(map(str, study.live)) & set(dead)


def test_removing_the_answering_heads_hurts_and_removing_others_does_not(study):
    whole = study.right(study.asked["random"].held)
    assert whole - study.without(study.letters, "random") > 0.3
    for head in study.pool([2]):
        assert whole - study.without([head], "random") < 0.15


def test_all_directions_change_nothing_and_none_leave_chance(study):
    whole = study.right(study.asked["standard"].held)
    for part in "qkv":
        assert study.projected("standard", part, 16) == whole
    assert study.projected("standard", "qk", 0) < 0.5 < whole
    assert study.projected("random", "qk", 16, by_index=True) == study.right(study.asked["random"].held)


def test_directions_in_which_queries_and_keys_meet_keep_at_least_what_singular_vectors_keep(study):
    meet = [study.reduced("standard", study.meeting("standard", rank)) for rank in (0, 3, 16)]
    assert meet[0] == study.projected("standard", "qk", 0) and meet[2] == study.right(study.asked["standard"].held)
    assert study.projected("standard", "qk", 3) <= meet[1] < 0.9
    for space in study.meeting("standard", 3):
        torch.testing.assert_close(space.basis.mT @ space.basis, torch.eye(3), atol=1e-5, rtol=0)


def test_queries_tell_the_word_that_is_asked_and_not_its_index(study):
    said = rows.rank_three(study).values
    assert (
        said["asked word: of the queries' variance"] > 0.9 > 0.1 > said["index of its option: of the queries' variance"]
    )
    kinds = torch.arange(60) % 3
    assert rows._decided(torch.eye(3, dtype=torch.float64)[kinds] - 1 / 3, kinds) == pytest.approx(1)
    noise = torch.randn(6000, 4, generator=torch.Generator().manual_seed(0))
    assert abs(rows._decided(noise, torch.arange(6000) % 1500)) < 0.03


def test_attention_among_labels_is_its_own_with_the_own_query_and_chance_when_the_index_is_moved(study):
    own = study.patterns("standard")
    torch.testing.assert_close(own, study.patterns("standard", torch.arange(64)))
    assert float(own.mean()) > 0.5 > float(study.patterns("standard", study.same_index()).mean())
    prompts = study.asked["standard"].held
    assert torch.equal(prompts.right[study.same_index()], prompts.right)
    assert not bool((prompts.right[(torch.arange(64) + 1) % 64] == prompts.right).any())


def test_direct_effects_add_up_and_nothing_is_lost_when_all_nodes_are_kept(study):
    effects = study.effects("random")
    every = list(setup.nodes_of(effects, study.live))
    assert setup.kept(effects, study.live, every) == pytest.approx(1, abs=1e-6)
    both = setup.kept(effects, study.live, every[1:]) + setup.kept(effects, study.live, [every[0], *every[2:]])
    assert setup.kept(effects, study.live, every[2:]) == pytest.approx(both - 1, abs=1e-5)
    assert set(study.letters) <= set(setup.output_set(study, "random"))


def test_total_effect_of_the_last_heads_is_their_direct_effect_where_the_last_mlp_is_frozen(study):
    """No later reader is left. The planted model's MLPs write nothing, so there it holds without freezing."""
    model = planted_llama.build()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (6, 12), generator=generator)
    ids[:, 0], other = 0, ids.roll(1, 0)
    last = layout(model).main.layers - 1
    nodes = [head for head in layout(model).heads() if head.layer == last]

    def metric(logits):
        return logits[..., 5] - logits[..., 9]

    total = activation_patch(model, ids, other, metric, nodes=nodes).heads[:, last]
    direct = path_patch(model, ids, other, metric, senders=nodes, freeze=("heads", "mlps")).heads[:, last]
    torch.testing.assert_close(total, direct, atol=1e-4, rtol=1e-4)


def test_rows_depend_on_which_heads_are_named(study):
    """With heads named that do something else the rows about the answering heads fail."""
    idle = [head for head in study.pool([2])][:2]
    other = setup.Study(study.model, study.layout, 0, study.asked, study.heads, study.live, idle)
    assert not rows.ablation(other).holds and not rows.correct_letter(other).holds
    assert not rows.mutations(other).holds


def test_margins_decide(study):
    for measure in (rows.compress, rows.nth_item, rows.partial, rows.more, rows.output_nodes, rows.categorize):
        row = measure(study)
        assert row.margin is not None and row.holds == (row.margin >= 0) and row.control
        assert row.values


def test_a_hand_built_model_has_one_correct_letter_head_whatever_the_labels(run):
    from headwise.specimens import planted

    model = planted.build(vocabulary=128, positions=64)
    for labels in setup.LABELLINGS:
        asked = choice_prompts(16, labels=labels, right=torch.arange(16) % 4)[0]
        assert categorize_heads(model, asked).of("correct letter") == [planted.INDUCTION]
        assert planted.INDUCTION in live_heads(model, asked.input_ids)


def test_the_picture_is_drawn(study, run):
    rows.draw(run, study)
    assert run.figures[-1] == Path(run.out) / "multiple-choice-circuit.png"
    assert run.figures[-1].stat().st_size > 10_000
