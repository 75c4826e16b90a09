"""Algorithms on numbers, against plain loops; ranges; recall; pointers."""

import statistics

import pytest
import torch

from headwise.tasks.algorithmic import ALGORITHMS, algorithm, number_lists, pointer_hops, recall_by_key


def by_loops(task: str, row: list[float]) -> list[float]:
    if task == "sort":
        return sorted(row)
    if task == "max-subarray":  # Kadane
        best, here, out = float("-inf"), 0.0, []
        for value in row:
            here = max(value, here + value)
            best = max(best, here)
            out.append(best)
        return out
    answer = {"sum": sum, "min": min, "max": max, "median": statistics.median}[task]
    return [answer(row[: i + 1]) for i in range(len(row))]


@pytest.mark.parametrize("task", ALGORITHMS)
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_answers(task, length):
    values = number_lists(30, length, generator=torch.Generator().manual_seed(length)).double()
    expected = torch.tensor([by_loops(task, row) for row in values.tolist()], dtype=torch.float64)
    torch.testing.assert_close(algorithm(task, values), expected)


def test_medians_are_torchs_midpoints():
    values = number_lists(20, 6)
    expected = torch.stack([values[:, : i + 1].quantile(0.5, 1, interpolation="midpoint") for i in range(6)], 1)
    torch.testing.assert_close(algorithm("median", values), expected)


def test_negative_lists_have_a_best_run_of_one():
    assert algorithm("max-subarray", torch.tensor([[-3.0, -1.0, -2.0]])).tolist() == [[-3.0, -1.0, -1.0]]


def test_lists_lie_between_ends_of_their_own():
    values = number_lists(2000, 200, generator=torch.Generator().manual_seed(0))
    assert values.min() >= -2 and values.max() <= 2
    widths = values.max(1).values - values.min(1).values
    assert 1.2 < widths.mean() < 1.45  # two even draws of [-2, 2] are 4/3 apart


def test_no_list_has_both_ends_in_the_rejected_range():
    values = number_lists(500, 400, low=-4.0, high=4.0, reject=(-2.0, 2.0), generator=torch.Generator().manual_seed(0))
    assert (values.abs().max(1).values > 1.95).all()
    plain = number_lists(500, 400, low=-4.0, high=4.0, generator=torch.Generator().manual_seed(0))
    assert not (plain.abs().max(1).values > 1.95).all()


def test_lists_repeat_with_their_generator():
    one, two = (number_lists(5, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("reject", [(-2.0, 2.0), (-3.0, 3.0)])
def test_rejecting_everything_is_refused(reject):
    with pytest.raises(ValueError, match="nothing is left to draw"):
        number_lists(3, reject=reject)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"low 2\.0, high 1\.0"):
        number_lists(3, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="task is 'mean'; choose one of sum, min"):
        algorithm("mean", torch.zeros(1, 2))
    with pytest.raises(ValueError, match="pairs 5, symbols 4"):
        recall_by_key(3, pairs=5, symbols=4)
    with pytest.raises(ValueError, match="hops 0"):
        pointer_hops(3, hops=0)
    with pytest.raises(ValueError, match=r"low 2\.0, high 1\.0"):
        pointer_hops(3, low=2.0, high=1.0)


def test_the_answer_is_the_value_beside_the_asked_key():
    data = recall_by_key(40, pairs=5, symbols=9, generator=torch.Generator().manual_seed(1))
    assert data.tokens.shape == (40, 6, 18)
    keys, values = data.tokens.split(9, 2)
    assert (keys.sum(2) == 1).all() and not values[:, -1].any() and (values[:, :-1].sum(2) == 1).all()
    same = (keys[:, :-1] * keys[:, -1:]).sum(2)
    assert (same.sum(1) == 1).all()  # keys differ
    assert torch.equal((same[..., None] * values[:, :-1]).sum(1).argmax(1), data.answers)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_answers_are_the_numbers_at_the_end_of_the_chain(hops):
    data = pointer_hops(30, 6, hops=hops, generator=torch.Generator().manual_seed(hops))
    assert data.tokens.shape == (30, 6, 7)
    for tokens, answers in zip(data.tokens.tolist(), data.answers.tolist(), strict=True):
        for place in range(6):
            here = place
            for _ in range(hops):
                here = tokens[here][:6].index(1.0)
            assert answers[place] == tokens[here][6]


def test_pointers_are_even_over_places_and_numbers_of_their_range():
    data = pointer_hops(2000, 4, low=-6.0, high=6.0, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount((4 * torch.arange(4) + data.pointers).flatten(), minlength=16) / 2000
    assert (counts - 0.25).abs().max() < 0.04
    assert 5.9 < data.numbers.abs().max() <= 6 and (data.answers.var() - 12).abs() < 0.8
    assert torch.equal(data.tokens[..., 4], data.numbers)
    assert torch.equal(data.tokens[..., :4].argmax(2), data.pointers)
