import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.bigram_backcopy import BigramBackcopy


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(5, 40), st.integers(1, 4), st.integers(3, 40), st.integers(0, 99))
def test_every_trigger_copies_the_token_before_it(vocab, triggers, length, seed):
    task = BigramBackcopy(vocab, triggers, length, seed=seed)
    ids = task.sample(8, draw(seed))
    assert ids.shape == (8, length) and bool((ids[:, 0] == 0).all()) and bool((ids[:, 1:] > 0).all())
    rows = task.trigger_mask(ids)[:, 1:-1]
    assert torch.equal(ids[:, 2:][rows], ids[:, :-2][rows])
    assert not bool(task.trigger_mask(ids)[:, 1].any())  # so BOS is never copied


def test_triggers_are_the_most_frequent_symbols():
    matrix = torch.tensor([[0.1, 0.1, 0.8], [0.1, 0.1, 0.8], [0.3, 0.1, 0.6]], dtype=torch.float64)
    assert BigramBackcopy(transition=matrix, triggers=1).triggers == (3,)
    text = BigramBackcopy(transition="abracadabra", triggers=1, length=8)
    assert text.symbols == ["a", "b", "c", "d", "r"] and text.triggers == (1,)
    # a is followed by b, c, d, b; the last a by nothing
    torch.testing.assert_close(text.transition[1, 1:], torch.tensor([0, 2, 1, 1, 0], dtype=torch.float64) / 4)
    # the first symbol: unigrams without the trigger, renormalised
    torch.testing.assert_close(text.transition[0, 1:], torch.tensor([0, 2, 1, 1, 2], dtype=torch.float64) / 6)


def test_other_rows_follow_the_table():
    task = BigramBackcopy(8, 2, 64, seed=3)
    ids = task.sample(2000, draw())
    now, after = ids[:, 1:-1], ids[:, 2:]
    free = ~task.trigger_mask(ids)[:, 1:-1]
    for token in range(1, 9):
        chosen = after[free & (now == token)]
        if len(chosen) < 5000:
            continue
        share = torch.bincount(chosen, minlength=9).double() / len(chosen)
        assert (share - task.transition[token]).abs().max() < 4 * 0.5 / math.sqrt(len(chosen))


def test_the_oracle_is_a_distribution_and_a_lower_bound():
    task = BigramBackcopy(16, 3, 48, seed=1)
    ids = task.sample(64, draw())
    truth = task.oracle_logprobs(ids)
    torch.testing.assert_close(truth.exp().sum(-1), torch.ones(64, 48, dtype=torch.float64))
    bayes = task.bayes_loss(ids)
    assert bayes["trigger"] == 0.0
    perfect = task.losses(truth.clamp(min=-1e4), ids)
    assert perfect["excess"] == pytest.approx(0, abs=1e-9) and perfect["trigger"] == pytest.approx(0, abs=1e-9)
    assert perfect["accuracy"] == 1.0
    for seed in range(5):
        noise = torch.randn(truth.shape, generator=draw(seed), dtype=torch.float64)
        worse = task.losses(truth.clamp(min=-20) + noise, ids)
        assert worse["excess"] > 0 and worse["trigger"] > 0


def test_losses_are_those_of_a_loop_over_rows():
    task = BigramBackcopy(6, 2, 10, seed=2)
    ids = task.sample(3, draw(5))
    logits = torch.randn(3, 10, 7, generator=draw(6))
    split = {True: [], False: []}
    for b in range(3):
        for t in range(1, 9):
            row = logits[b, t].double().log_softmax(-1)
            trigger = int(ids[b, t]) in task.triggers
            if trigger:
                split[True].append(-float(row[ids[b, t - 1]]))
            else:
                p = task.transition[ids[b, t]]
                split[False].append(
                    float(sum(-p[v] * row[v] + (p[v] * p[v].log() if p[v] > 0 else 0) for v in range(7)))
                )
    got = task.losses(logits, ids)
    assert got["trigger"] == pytest.approx(sum(split[True]) / len(split[True]))
    assert got["excess"] == pytest.approx(sum(split[False]) / len(split[False]))


def test_avoided_symbols_never_come():
    task = BigramBackcopy(12, 2, 60, seed=4)
    avoid = torch.tensor([[3, 4, 5], [1, 2, 6]])
    ids = task.sample(2, draw(), avoid=avoid)
    assert not bool((ids[:, :, None] == avoid[:, None]).any())
    rows = task.trigger_mask(ids)[:, 1:-1]
    assert torch.equal(ids[:, 2:][rows], ids[:, :-2][rows])


def test_the_same_seed_gives_the_same_text():
    one, two = (BigramBackcopy(20, 3, 32, seed=9) for _ in range(2))
    assert torch.equal(one.transition, two.transition)
    assert torch.equal(one.sample(4, draw(1)), two.sample(4, draw(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 8, "triggers": 8}, r"triggers is 8; expected 0 to 7"),
        ({"triggers": [0, 3]}, r"trigger 0 is BOS"),
        ({"triggers": [1, 99]}, r"expected different ids of 1 to 64"),
        ({"length": 2}, r"length is 2; .* at least 3"),
        ({"transition": torch.full((3, 3), 0.5)}, r"row 0 of transition sums to 1.5"),
        ({"transition": torch.full((3, 3), math.nan)}, r"negative or not finite"),
        ({"transition": torch.rand(2, 3)}, r"shape \(2, 3\); expected a square matrix"),
        ({"transition": "aaaa"}, r"fewer than two different characters"),
        ({"transition": torch.eye(4), "vocab_size": 5}, r"vocab_size is 5 but transition has 4"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        BigramBackcopy(**arguments)
