"""What columns receive: the definition, and what a cache keeps of it."""

import copy

import pytest
import torch
from tests.contracts.models_under_test import left_padded, text, tiny_llama
from torch import Tensor

from headwise.attend.call import Call
from headwise.attend.received import ColumnMemory, Received, column_sums, mean_received, rows_that_see, sink_limit
from headwise.attend.step import Step
from headwise.heads.sinks import find_sinks, received_attention
from headwise.hf.maps import attention_maps


def maps(b: int = 2, h: int = 3, n: int = 9, seed: int = 0) -> Tensor:
    scores = 3 * torch.randn(b, h, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def test_a_column_counts_the_rows_that_see_it():
    a = maps()
    found = mean_received(a)
    for k in range(9):
        torch.testing.assert_close(found[..., k], a[:, :, :, k].sum(-1) / (9 - k))
    # Every row of a map that is not causal sees every column.
    whole = mean_received(a, causal=False)
    torch.testing.assert_close(whole, a.sum(2) / 9)
    # The last rows of a longer text.
    torch.testing.assert_close(mean_received(a[:, :, 5:])[..., 7], a[:, :, 7:, 7].sum(-1) / 2)


def test_rows_of_padding_do_not_count():
    a = maps(n=7)
    padded = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
    padded[:, :, 2:, 2:] = a
    padded[:, :, :2] = 1 / 9  # what rows of padding hold is anyone's guess
    real = (torch.arange(9) >= 2).expand(2, -1)
    found = mean_received(padded, real)
    torch.testing.assert_close(found[..., 2:], mean_received(a))
    assert (found[..., :2] == 0).all()


@pytest.mark.parametrize(
    ("shape", "real", "causal", "message"),
    [
        ((1, 1, 4, 3), None, True, "a causal map of 4 rows and 3 columns"),
        ((1, 1, 2, 3), (1, 3), False, "2 rows, 3 columns and padding"),
    ],
)
def test_refusals(shape, real, causal, message):
    with pytest.raises(ValueError, match=message):
        mean_received(torch.zeros(shape), None if real is None else torch.ones(real).bool(), causal=causal)


@pytest.mark.parametrize(("threshold", "relative"), [(0.0, False), (1.0, False), (-1.0, True), (0.0, True)])
def test_thresholds_out_of_range(threshold, relative):
    with pytest.raises(ValueError, match=f"here: threshold is {threshold}; "):
        sink_limit("here", threshold, relative)
    assert sink_limit("here", None, False) == 0.1 and sink_limit("here", None, True) == 5.0


@pytest.mark.parametrize("kind", ["flag", "keys", "dense", "bidirectional", "window", "by head"])
def test_a_call_is_counted_without_its_map(kind):
    torch.manual_seed(0)
    b, h, t, s, d = 2, 4, 150, 150, 8
    real = torch.ones(b, s, dtype=torch.bool)
    real[1, :3] = kind in ("flag", "bidirectional")
    row, column = torch.arange(t)[:, None], torch.arange(s)
    seen = (column <= row) & real[:, None, None]
    masks: dict[str, Tensor] = {
        "keys": real[:, None, None],
        "dense": seen,
        "window": seen & (row - column < 40),
        "by head": torch.randn(1, h, t, s).masked_fill(~seen[1:], -torch.inf),
    }
    call = Call(
        torch.randn(b, h, t, d), torch.randn(b, 2, s, d), torch.randn(b, 2, s, d), masks.get(kind),
        causal=kind in ("flag", "keys"), kind="bidirectional" if kind == "bidirectional" else "causal",
        step=Step(torch.zeros(b, s).long(), real, real, 0, t),
    )  # fmt: skip
    shown = torch.ones(b, h, t, s, dtype=torch.bool) if kind == "bidirectional" else seen.expand(b, h, t, s)
    shown = {"window": masks["window"], "by head": seen[1:]}.get(kind, shown).expand(b, h, t, s)
    scores = call.q.double() @ call.k.double().repeat_interleave(2, 1).mT
    scores = scores + (masks["by head"] if kind == "by head" else 0)
    weights = scores.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0.0) * real[:, None, :, None]
    counts = (shown & real[:, None, :, None]).sum(2)
    torch.testing.assert_close(column_sums(call).double(), weights.sum(2), atol=1e-5, rtol=1e-5)
    assert torch.equal(rows_that_see(call).expand(b, h, s).long(), counts)
    mean = Received(column_sums(call), rows_that_see(call)).mean.double()
    torch.testing.assert_close(mean, weights.sum(2) / counts.clamp_min(1), atol=1e-6, rtol=1e-5)


def step_of(past: int, length: int, batch: int = 1) -> Call:
    q, k = torch.randn(batch, 2, length, 4), torch.randn(batch, 2, past + length, 4)
    return Call(q, k, k, step=Step.of(batch, length, past=past), heads=[3, 5])


def add(memory: ColumnMemory, call: Call, amount: float) -> Tensor:
    before = memory.before(call)
    memory.keep(call, Received(before.sums + amount, before.counts + call.q.shape[2]))
    return before.sums


def test_a_memory_grows_and_counts_a_forward_once():
    memory = ColumnMemory()
    assert (add(memory, step_of(0, 3), 1.0) == 0).all()
    call = step_of(3, 1)
    first = add(memory, call, 2.0)
    assert first[0, 0].tolist() == [1, 1, 1, 0]
    assert torch.equal(add(memory, call, 2.0), first)  # the same forward again
    assert add(memory, step_of(4, 2), 0.0)[0, 1].tolist() == [3, 3, 3, 2, 0, 0]
    with pytest.raises(RuntimeError, match="the cache went back from 6 to 2 tokens"):
        memory.before(step_of(2, 1))


def test_a_memory_is_divided_with_the_heads():
    """Another edit that comes and goes divides the heads of a layer otherwise; each keeps its own."""
    memory = ColumnMemory()
    call = step_of(0, 2)
    memory.before(call)
    memory.keep(call, Received(torch.tensor([[[1.0, 2], [30, 40]]]), torch.ones(1, 1, 2)))
    for heads, expected in (([5], [30, 40, 0]), ([3], [1, 2, 0])):
        part = step_of(2, 1).take([int(heads[0] == 5)])
        assert part.heads == heads
        before = memory.before(part)
        assert before.sums[0, 0].tolist() == expected
        memory.keep(part, Received(before.sums + 1, before.counts + 1))
    both = memory.before(step_of(3, 1))
    assert both.sums[0].tolist() == [[2, 3, 1, 0], [31, 41, 1, 0]] and both.counts.shape == (1, 2, 4)


def test_rows_that_moved_are_known_by_their_keys():
    memory, k = ColumnMemory(), torch.randn(3, 2, 4, 4)

    def call(rows: list[int], past: int) -> Call:
        keys = torch.cat([k[rows, :, :past], torch.randn(len(rows), 2, 4 - past, 4)], 2)[:, :, : past + 1]
        return Call(keys[:, :, past:], keys, keys, step=Step.of(len(rows), 1, past=past))

    start = Call(k[:, :, :3], k[:, :, :3], k[:, :, :3], step=Step.of(3, 3))
    memory.before(start)
    memory.keep(start, Received(torch.arange(3.0)[:, None, None].expand(3, 2, 3), torch.ones(3, 1, 3)))
    copied = copy.deepcopy(memory)
    assert memory.before(call([2, 0, 0], 3)).sums[:, 0, 0].tolist() == [2, 0, 0]
    assert copied.before(call([1, 1], 3)).sums[:, 0, 0].tolist() == [1, 1]  # a batch that shrank


# Through a model


def test_received_attention_is_the_mean_of_a_models_columns():
    model = tiny_llama()
    rows = [text(1, 12)[0], text(1, 7, seed=1)[0]]
    found = received_attention(model, left_padded(rows))
    assert found.shape == (2, 2, 4, 12) and found[1, ..., :5].isnan().all() and not found[1, ..., 5:].isnan().any()
    for row, ids in enumerate(rows):
        a = attention_maps(model, ids[None]).view(2, 4, len(ids), len(ids))
        torch.testing.assert_close(found[row, ..., -len(ids) :], mean_received(a), atol=1e-6, rtol=1e-5)


def test_sinks_are_found_where_they_are():
    model, ids = tiny_llama(), text(2, 12)
    received = received_attention(model, ids)
    limit = float(received.flatten().sort().values[-10:-8].mean())  # nine stand out
    found = find_sinks(model, ids, by="received", threshold=limit)
    assert found.heads is not None and int(found.heads.sum()) == 9 and torch.equal(found.heads, received > limit)
    assert torch.equal(found.members, found.heads.any(2)) and found
    assert torch.equal(found.values, received.amax(2))
    only = find_sinks(model, ids, by="received", threshold=limit, layers=[1])
    assert not only.members[:, 0].any() and torch.equal(only.members[:, 1], found.members[:, 1])
    assert not find_sinks(model, ids, by="received", threshold=0.9999)
    with pytest.raises(ValueError, match=r"find_sinks: threshold is 1.5; a mean weight lies between 0 and 1"):
        find_sinks(model, ids, by="received", threshold=1.5)
