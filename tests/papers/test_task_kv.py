"""The run of task-kv: its caches are of equal bytes, its rows say what made-up results would say, its parts by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.attend.addresses import Head
from headwise.papers import _task_kv_rows as rows
from headwise.papers._task_kv_setup import (
    BUDGETS,
    FULL,
    MAP,
    MEAN,
    METHODS,
    MORE_RECENT,
    NONE,
    RANDOM,
    RECENT,
    SINK,
    SNAP,
    STREAMING,
    TASK,
    WAYS,
    Accuracies,
    Prompts,
    Reader,
    middles,
)
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(find_paper("task-kv"), 0, "cpu", tmp_path_factory.mktemp("run"), say=lambda text: None)


@pytest.fixture(scope="module")
def tasks(run) -> Reader:
    return Reader.load("tasks", run, count=8)


def made_up(**shares: float) -> Accuracies:
    """Results in which a method answers so many of 200 questions, at every budget and in both ways."""
    found = Accuracies()
    names = {"task": TASK, "streaming": STREAMING, "snap": SNAP, "map": MAP, "random": RANDOM, "none": NONE}
    given = {names[name]: share for name, share in shares.items()}
    for model, task in (("tasks", "needles"), ("tasks", "repeats"), ("text", "questions"), ("text", "copies")):
        for way in WAYS:
            for method in (*METHODS, NONE, MEAN, MORE_RECENT):
                for budget in (1.0,) if method == FULL else BUDGETS:
                    right = [i < 50 * given.get(method, 0.5 if method != FULL else 0.9) for i in range(50)]
                    found._add((model, task, way, method, budget), right, budget)
    return found


def test_the_head_map_gives_as_many_full_heads_as_the_budget_holds(tasks):
    policies: dict[float, Any] = {budget: tasks.policy(MAP, budget, 0) for budget in BUDGETS}
    assert tasks.best_key_heads(1) == ((), (), (0,)) or tasks.best_key_heads(1) == ((), (), (1,))
    assert tasks.best_key_heads(99) == policies[0.6].full == ((), (), (0, 1))
    for policy in policies.values():
        assert sum(map(len, policy.full)) <= 2


@pytest.mark.parametrize("way", WAYS)
def test_every_method_keeps_its_bytes_and_full_caches_answer(tasks, way):
    prompts = Prompts.of(tasks, tasks.questions["needles"], way)
    right, share = prompts.right(None)
    assert right == [True] * 8 and share == 1
    for method in METHODS[1:]:
        for budget in BUDGETS:
            right, share = prompts.right(tasks.policy(method, budget, 0))
            assert budget - 0.04 <= share <= budget, method
    right, _ = prompts.right(tasks.policy(STREAMING, 0.2, 0))
    assert sum(right) < 4, "what lies before the last fifth of a text is gone"
    prompts.answers = [answer.flip(0) for answer in prompts.answers]
    assert not any(prompts.right(None)[0]), "a wrong answer is not right"


def test_the_question_is_seen_only_in_the_first_way(tasks):
    one, two = (Prompts.of(tasks, tasks.questions["needles"], way) for way in WAYS)
    assert one.cache.get_seq_length() == two.cache.get_seq_length() + 3 == 300
    for prompts in (one, two):
        for row, question in enumerate(tasks.questions["needles"]):
            assert prompts.important[row].nonzero()[:, 0].tolist() == list(range(*question.important))
            assert torch.equal(question.context[slice(*question.important)], question.answer)


def test_texts_of_the_text_model_hold_their_answers(run):
    reader = Reader.load("text", run, count=4)
    for task, questions in reader.questions.items():
        for one in questions:
            assert torch.equal(one.context[slice(*one.important)], one.answer), task
            assert 250 < len(one.context) + len(one.question) <= 300
    prompts = Prompts.of(reader, reader.questions["questions"], WAYS[0])
    assert sum(prompts.right(None)[0]) >= 2


def test_what_stands_in_the_place_of_the_middle(tasks):
    prompts = Prompts.of(tasks, tasks.questions["needles"], WAYS[0])
    kept = {}
    for name, policy in {TASK: tasks.policy(TASK, 0.4, 0), **middles(tasks, 0.4, 0)}.items():
        cache = prompts.cache.fork(policy)
        full = cache.heterogeneous[1]
        assert full is not None
        light = next(head for head in range(8) if head not in full[0].tolist())
        kept[name] = cache.kept_positions(1)[0][light]
    ends = [*range(SINK), *range(300 - RECENT, 300)]
    more = len(kept[TASK]) - len(ends)
    assert kept[NONE] == ends and more > 5
    assert kept[MORE_RECENT] == [*range(SINK), *range(300 - RECENT - more, 300)]
    assert kept[MEAN] == sorted([*ends, SINK]), "the mean stands in the place of the first token dropped"


def test_rows_follow_their_results():
    better = made_up(task=0.9, streaming=0.2, snap=0.6, map=0.7, random=0.5)
    row = rows.outperforms(better)
    assert row.holds and row.interval is not None and row.interval[0] > 0
    assert row.values["Task-KV - SnapKV, 40%, in the prompt"] == pytest.approx(0.3)
    assert (
        row.values["Task-KV - SnapKV, 40%, in the prompt, low"] > 0.2
        and row.values["SnapKV, 20%, in the prompt"] == 0.6
    )
    assert rows.middle(better).holds
    for name in ("streaming", "snap", "map"):
        worse = made_up(**{"task": 0.6, name: 0.8})
        assert not rows.outperforms(worse).holds, name
    same = rows.outperforms(made_up(task=0.5))
    assert same.interval is not None and same.interval[0] <= 0 <= same.interval[1]
    assert not rows.middle(made_up(task=0.3)).holds
    assert rows.measured_bytes(better).holds
    better.shares[("tasks", "needles", WAYS[0], SNAP, 0.2)] = [0.21]
    assert not rows.measured_bytes(better).holds


def test_the_split_must_beat_a_random_one_and_differ_between_tasks():
    apart = [{(0, 1), (1, 2)}] * 4, [{(0, 3), (1, 0)}] * 4
    splits = rows.Splits()
    for model, names in (("tasks", ("needles", "repeats")), ("text", ("questions", "copies"))):
        for name, full in zip(names, apart, strict=True):
            splits.full[model, name] = splits.drawn[model, name] = full
    assert rows.overlaps(splits.full, "text") == ([1.0] * 4, [0.0] * 4)
    assert rows.separator(made_up(task=0.8, random=0.6), splits).holds
    assert not rows.separator(made_up(task=0.62, random=0.6), splits).holds  # less than 5 points
    alike = rows.Splits(full=dict.fromkeys(splits.full, apart[0]), drawn=splits.drawn)
    margin = rows.separator(made_up(task=0.8, random=0.6), alike).margin
    assert margin is not None and margin <= 0


def test_what_heads_look_at_and_what_is_lost_without_them(tasks, run):
    splits = rows.Splits()
    questions = tasks.questions["needles"]
    prompts = Prompts.of(tasks, questions, WAYS[0])
    splits.add(tasks, "needles", prompts, 0)
    assert len(splits.mass) == 8 and all(len(one) == 5 for one in splits.full["tasks", "needles"])  # 2 + 2 + 1
    mass, spread = rows.looks(prompts)
    assert mass[2][:, [0, 1]].mean() > mass[2][:, 2:7].mean(), "the heads that retrieve look at the answer"
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in (*mass, *spread))
    assert rows._contrast(mass, 0, {(2, 0), (2, 1)}, {(2, head) for head in range(4)}) == pytest.approx(
        float(mass[2][0, :2].mean() - mass[2][0, 2:4].mean())
    )
    copying = [{(2, 0), (2, 1)}] * 8
    assert rows._answered(tasks, questions, None) == [1.0] * 8
    assert sum(rows._answered(tasks, questions, copying)) < 2
    assert rows.live_key_heads(tasks) == {(layer, head) for layer in range(3) for head in range(7)}
    assert Head(0, 7) not in tasks.live


def test_the_checks_hold(tasks):
    assert rows.whole([tasks]).holds and rows.memory([tasks]).holds
    row = rows.mask([tasks])
    assert row.holds and row.values["whole cache"] > 0.1


def test_the_picture_is_drawn(run):
    rows.draw(run, made_up(task=0.9))
    assert run.figures[-1] == Path(run.out) / "task-kv.png" and run.figures[-1].stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_run_gives_every_row(tmp_path: Path):
    from headwise.papers import task_kv

    run = Run(find_paper("task-kv"), 0, "cpu", tmp_path)
    torch.manual_seed(0)
    measured = task_kv.reproduce(run)
    assert set(measured) == {row.id for row in find_paper("task-kv").claims if row.kind != "untestable"}
    assert run.figures[0].exists()
