"""The run of retrieval-heads on a model whose heads are known, where every row's numbers can be told beforehand."""

from pathlib import Path
from random import Random

import pytest
import torch

from headwise.attend.head_map import HeadMap
from headwise.heads.retrieval import copy_scores, retrieval_scores
from headwise.hf.addresses import layout
from headwise.papers import _retrieval_rows as rows
from headwise.papers._retrieval_setup import Asked, Extension, Reader, Removals, two_steps
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens import planted_llama
from headwise.specimens.registry import load_specimen
from headwise.tasks.needles import needle

COPY, PREVIOUS = planted_llama.INDUCTION, planted_llama.PREVIOUS


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("retrieval-heads"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


def make(lengths, repeats, seed):
    options = {"words": range(4, 60), "marks": (2, 3), "depths": (0.0, 0.5, 1.0)}
    return needle("symbols", lengths=lengths, repeats=repeats, seed=seed, **options)


def reader(scores: HeadMap | None = None) -> Reader:
    """The hand-built model as if it were trained: one head copies, one feeds it, six do nothing."""
    model = planted_llama.build()
    scored, held = make((40, 80), 3, 1), Asked.of(model, make((40, 80), 2, 2))
    found = retrieval_scores(model, scored, max_new_tokens=6) if scores is None else scores
    return Reader("planted", model, None, make, 160, scored, held, found, layout(model).heads(), 1.0)


@pytest.fixture(scope="module")
def known() -> Reader:
    return reader()


@pytest.fixture(scope="module")
def removals(known, run) -> dict[str, Removals]:
    return {"planted": Removals.of(known, run)}


def test_removals_are_as_the_model_was_built(removals):
    found = removals["planted"]
    assert found.intact == found.few == 1 and found.strong == found.every < 0.05
    # Of the copying head's layer three heads are left, none of which does anything.
    assert found.strong_others == found.every_others == [1.0] * 3
    # Of all seven others, one is the head on which copying is built.
    assert sorted(found.anywhere)[1:] == [1.0] * 6 and min(found.anywhere) < 0.05
    assert 0 <= found.every_uniform < 0.3


def test_rows_that_hold_by_construction(known, removals, run):
    for row in (
        rows.responsible(removals),
        rows.intrinsic([known]),
        rows.explain([known], run),
        rows.teacher_forced([known]),
        rows.stable([known]),
        rows.hand_built(run),
    ):
        assert row.holds, row.measured
    assert rows.explain([known], run).margin == pytest.approx(0.1)


def test_rows_that_fail_by_construction(known, removals):
    sparse = rows.sparse([known])
    assert not sparse.holds and sparse.margin == pytest.approx(0.05 - 1 / 8)
    random = rows.random_heads(removals)
    lost = (1 - min(removals["planted"].anywhere)) / 7
    assert not random.holds and random.margin == pytest.approx(0.05 - lost)
    assert not rows.universal([known]).holds  # one model is no spectrum of models
    always = rows.always_active([known])
    assert not always.holds and "1 heads active in every run, 18 runs" in always.measured  # fewer than 64 runs
    assert not rows.sometimes_active([known]).holds  # the one retrieval head is always active


def test_heads_that_do_nothing_are_not_found_responsible(run):
    """The rows depend on which heads are named: with an idle head named instead of the copying one they fail."""
    model = planted_llama.build()
    idle = planted_llama.IDLE[-1]
    wrong = HeadMap({"retrieval": {head: float(head == idle) for head in layout(model).heads()}}, layout(model))
    other = reader(wrong)
    found = {"planted": Removals.of(other, run)}
    assert not rows.responsible(found).holds and not rows.causal(found).holds and not rows.explain([other], run).holds


def test_the_extension_row_wants_the_same_heads(known, run):
    same = copy_scores(known.model, known.held.prompts)
    assert rows.extension(known, Extension(0.5, 1.0, same), run).holds
    assert not rows.extension(known, Extension(0.5, 0.8, same), run).holds  # it must retrieve afterwards
    moved = HeadMap({"retrieval": {head: float(head == PREVIOUS) for head in layout(known.model).heads()}}, same.layout)
    assert not rows.extension(known, Extension(0.5, 1.0, moved), run).holds


def test_answer_tokens_that_can_be_guessed_do_not_count(known):
    assert known.held.unguessed == [[True] * 6] * len(known.held.prompts)
    half = Asked(known.held.prompts, [[True] * 3 + [False] * 3] * len(known.held.prompts))
    with known.without([COPY]):
        assert sum(half.right(known.model)) / 12 < 0.1
    assert half.right(known.model) == half.right(known.model, guessed=True) == [1.0] * 12


def test_the_picture_is_drawn(known, removals, run):
    rows.draw(run, [known], removals, Extension(0.5, 1.0, known.scores))
    assert run.figures[-1] == Path(run.out) / "retrieval-heads.png" and run.figures[-1].stat().st_size > 10_000


def test_questions_in_two_steps_can_be_answered_from_their_text():
    for seed in range(20):
        text, asked, number = two_steps(Random(seed))
        (said,) = [line for line in text.split(". ") if line.startswith(f"The neighbour of {asked} is")]
        neighbour = said.split(" is ")[1].split()[0]
        assert f"The room number of {neighbour} is {number}." in text + "."
    assert two_steps(Random(3)) == two_steps(Random(3))


def test_two_written_steps_need_the_strong_heads(run):
    """On the shipped text model, with two of the questions of the run."""
    specimen = load_specimen("text")
    prompts = needle("sentence", tokenizer=specimen.tokenizer, lengths=(128,), depths=(0.5,), repeats=4)
    scores = copy_scores(specimen.model, prompts)
    text = Reader(
        "text", specimen.model, specimen.tokenizer, make, 512, prompts, Asked.of(specimen.model, prompts), scores,
        layout(specimen.model).heads(), 1.0,
    )  # fmt: skip
    row = rows.chain_of_thought(text, run)
    assert row.values["text: the answers right"] > row.values["text: without the heads of 0.5 or more"]


def test_the_shipped_models_have_the_heads_that_their_cards_promise():
    specimen = load_specimen("tasks")
    found = copy_scores(specimen.model, needle("symbols", lengths=(64,), depths=(0.0, 0.5, 1.0), repeats=3))
    copying = {address for address in specimen.card["masked"]["copying"] if address.startswith("2.")}
    assert {str(head) for head in found.select(threshold=0.5)} == copying


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path):
    from headwise.papers import retrieval_heads

    run = Run(find_paper("retrieval-heads"), 0, "cpu", tmp_path)
    torch.manual_seed(0)
    measured = retrieval_heads.reproduce(run)
    assert set(measured) == {row.id for row in find_paper("retrieval-heads").claims if row.kind != "untestable"}
    assert run.figures[0].exists()
