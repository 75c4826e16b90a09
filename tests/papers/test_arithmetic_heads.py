"""The run of arithmetic-heads: its rows on numbers that can be told beforehand, and its measurements on the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.heads.finetuning import finetune_only
from headwise.hf.addresses import layout
from headwise.papers import _arithmetic_rows as rows
from headwise.papers import _arithmetic_setup as setup
from headwise.papers._arithmetic_setup import Asked, Calculator, Nodes, Removals, Tuned, Tunings
from headwise.papers.record import find_paper
from headwise.papers.running import Run
from headwise.specimens.registry import load_specimen, specimen_checkpoints
from headwise.tasks.symbol_arithmetic import ArithmeticSymbols

TASKS = (*setup.SUMS, *setup.LETTERS)


@pytest.fixture(scope="module")
def model() -> Calculator:
    """The shipped model with effects written by hand: 2.0 and 2.1 first."""
    loaded = load_specimen("arithmetic").model
    order = [Head(2, 0), Head(2, 1), *(head for head in layout(loaded).heads() if str(head) not in ("2.0", "2.1"))]
    table = {head: 1.0 / (1 + place) for place, head in enumerate(order)}
    nodes = {task: Nodes(HeadMap({"effect": table}, layout(loaded)), {0: 0.1, 1: 0.2, 2: 0.3}) for task in TASKS}
    return Calculator(loaded, 0, nodes, {task: Asked.of(task, 40, 1) for task in TASKS})


def removals(**changes) -> Removals:
    """As the criteria want it: the key heads cost half, pairs nothing."""
    tasks = (*TASKS, "repeats")
    lost = {task: 0.5 if task in setup.SUMS else 0.0 for task in tasks}
    found = Removals(
        [Head(2, 0), Head(2, 1)],
        [[Head(2, 3), Head(2, 4)]] * 4,
        dict.fromkeys(tasks, 1.0),
        lost,
        {task: [0.0, 0.0, 0.1, 0.2] for task in tasks},
        [1.0, 0.6, 0.5],
        [1.0, 0.9, 0.9],
    )
    return replace(found, **changes)


def tuned(sums: float, letters: float, repeats: float) -> Tuned:
    right = {task: sums if task in setup.SUMS else letters for task in TASKS}
    return Tuned(100, {**right, "repeats": repeats}, nn.Linear(2, 2))


def tunings(**ways: Tuned) -> Tunings:
    full = {
        "full": tuned(1.0, 0.6, 0.5), "precise": tuned(0.9, 0.98, 0.97), "other heads, same MLP": tuned(0.8, 0.9, 0.9),
        "other heads and MLP": tuned(0.6, 0.9, 0.9), "low rank": tuned(0.9, 0.8, 0.8),
    }  # fmt: skip
    return Tunings([Head(2, 0), Head(2, 1)], 2, tuned(0.5, 1.0, 1.0), {**full, **ways})


def test_prompts_end_where_the_result_is_asked_for():
    symbols = ArithmeticSymbols()
    for task in TASKS:
        asked = Asked.of(task, 8, 3)
        for row in range(8):
            words = symbols.text(asked.ids[row]).split()
            assert words[-1] == ("is" if task.endswith("prefix") else "=") and len(words) == 1 + 6 * 3 + 4
            assert bool(asked.roles["equals"][row, -1]) and int(asked.roles["operator"][row].sum()) == 1
            assert int(asked.right[row]) in asked.among[row].tolist() and asked.right[row] != asked.wrong[row]


def test_rows_of_removals_hold_and_fail_by_their_numbers(model):
    assert rows.pivotal(removals()).holds
    assert rows.pivotal(removals()).margin == pytest.approx(0.15 - 0.075)
    assert not rows.pivotal(removals(lost={**removals().lost, "repeats": 0.2})).holds
    assert not rows.pivotal(removals(lost={**removals().lost, "add-infix": 0.29})).holds
    assert not rows.pivotal(removals(others={**removals().others, "add-infix": [0.0, 0.4]})).holds
    few = rows.few_heads(model, removals())
    assert few.holds and few.values["additions: the heads are enough to lose 30 points"] == pytest.approx(1 / 24)
    assert not rows.few_heads(model, removals(by_rank=[1.0, 0.8, 0.5])).holds
    # nothing that was removed cost as much: more than all of them are needed
    assert removals().needed(removals().from_below) == 3


def test_the_transfer_row_wants_every_other_sum(model):
    assert rows.transfer(model, removals()).holds
    assert not rows.transfer(model, removals(lost={**removals().lost, "subtract-prefix": 0.1})).holds
    assert not rows.transfer(model, removals(others={**removals().others, "add-prefix": [0.3]})).holds
    other = dict(reversed(list(zip(model.nodes["add-infix"].heads.of("effect"), range(24), strict=True))))
    turned = Nodes(
        HeadMap({"effect": {h: float(v) for h, v in other.items()}}, layout(model.model)), {0: 9.0, 1: 5.0, 2: 0.0}
    )
    moved = replace(model, nodes={**model.nodes, "add-prefix": turned})
    assert not rows.transfer(moved, removals()).holds


def test_the_rows_of_tuning_hold_and_fail_by_their_numbers():
    gain = rows.tuning_gain(tunings())
    assert gain.holds and gain.margin == pytest.approx(0.1)  # four fifths of the gain; the checkpoint had half
    assert not rows.tuning_gain(tunings(precise=tuned(0.8, 1.0, 1.0))).holds
    assert rows.no_compromise(tunings()).holds
    assert not rows.no_compromise(tunings(precise=tuned(0.9, 0.94, 1.0))).holds
    assert not rows.no_compromise(tunings(full=tuned(1.0, 1.0, 1.0))).holds  # forgets more than full tuning


def test_heads_that_read_the_operands_are_seen_to(model):
    """All heads of the last layer read both operands from the row that answers; idle ones are no key heads."""
    assert rows.focus(model).holds
    idle = {head: float(head.layer == 0 and head.head in (0, 1)) for head in layout(model.model).heads()}
    wrong = Nodes(HeadMap({"effect": idle}, layout(model.model)), {0: 0.0})
    other = Calculator(model.model, 0, {**model.nodes, "add-infix": wrong}, model.held)
    assert [str(head) for head in other.key] == ["0.0", "0.1"] and not rows.focus(other).holds


def test_written_shares_add_up_and_the_lens_ends_at_the_logits(model):
    shares, lens = rows.written(model, "add-infix")
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4) and len(lens) == 4
    asked = model.held["add-infix"]
    with torch.no_grad():
        logits = model.model(input_ids=asked.ids).logits[:, -1]
    digits = logits[:, ArithmeticSymbols().digits]
    mine = logits.gather(1, asked.right[:, None])[:, 0]
    assert lens[-1] == pytest.approx(float((mine - digits.mean(-1)).mean()), rel=1e-4)


def test_removing_heads_gives_their_mean_over_the_same_task(model):
    assert model.right("add-infix") == 1 and model.right("repeats") > 0.95
    every = layout(model.model).heads()
    assert model.right("add-infix", every) < 0.3  # without attention results are guessed
    assert model.right("add-infix") == 1


def test_checks_on_the_shipped_model(model):
    same = rows.same_prompt(model)
    assert same.holds and same.margin == 0
    assert rows.two_questions(model).values


def test_low_rank_adapters_start_as_the_model_and_have_about_as_many_entries():
    made = load_specimen("arithmetic").model
    ids = Asked.of("add-infix", 4, 1).ids
    with torch.no_grad():
        before = made(input_ids=ids).logits
        setup.low_rank(made, 20_000)
        torch.testing.assert_close(made(input_ids=ids).logits, before)
    entries = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert abs(entries - 20_000) < 2000


def test_a_few_steps_of_precise_tuning_change_nothing_else(monkeypatch):
    monkeypatch.setattr(setup, "STEPS", 3)
    made = load_specimen(f"arithmetic@{specimen_checkpoints('arithmetic')[0]}").model
    heads = [Head(2, 0), Head(2, 1)]
    way = setup.tune(made, lambda model: finetune_only(model, heads=heads, mlps=[2]), 0)
    assert way.entries == 2 * 4 * 8 * 64 + 3 * 64 * 192
    before = Tuned(0, {}, made)
    assert rows.frozen(Tunings(heads, 2, before, {"precise": way})).holds
    # named wrongly, entries outside have changed
    assert not rows.frozen(Tunings([Head(2, 0), Head(2, 2)], 2, before, {"precise": way})).holds
    full = setup.tune(made, lambda model: None, 0)
    assert full.entries == sum(p.numel() for p in made.parameters())


def test_the_picture_is_drawn(model, tmp_path):
    run = Run(find_paper("arithmetic-heads"), 0, "cpu", tmp_path, say=lambda text: None)
    rows.draw(run, model, removals(), tunings())
    assert run.figures == [tmp_path / "arithmetic-heads.png"] and run.figures[0].stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path):
    from headwise.papers import arithmetic_heads

    run = Run(find_paper("arithmetic-heads"), 0, "cpu", tmp_path)
    measured = arithmetic_heads.reproduce(run)
    assert set(measured) == {row.id for row in find_paper("arithmetic-heads").claims if row.kind != "untestable"}
    assert run.figures[0].exists()
