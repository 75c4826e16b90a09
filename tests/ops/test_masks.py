"""Masks against double loops, and what is remembered of a mask."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.ops import masks
from headwise.ops.masks import additive, decompose, empty_rows, visible


def as_list(answer: torch.Tensor | None) -> list:
    assert answer is not None
    return answer.tolist()


@st.composite
def drawn(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    t, s = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    shape = draw(st.sampled_from([(t, s), (s,), (1, s), (2, 1, t, s), (2, 1, 1, s), (1, 3, t, s), (2, 1, t, 1)]))
    kept = torch.rand(shape) > draw(st.sampled_from([0.2, 0.8]))
    if draw(st.booleans()):
        return kept, kept, t, s, draw(st.booleans())
    return torch.randn(shape).masked_fill(~kept, -torch.inf), kept, t, s, draw(st.booleans())


@given(drawn())
def test_visible_and_empty_rows_equal_a_double_loop(case):
    mask, kept, t, s, causal = case
    want = kept.expand(2, 3, t, s).clone()
    for i in range(t):
        for j in range(s):
            if causal and j > i:
                want[:, :, i, j] = False
    seen = visible(mask, causal, t, s)
    assert seen is not None and torch.equal(seen.expand(2, 3, t, s), want)
    middle = slice(t // 3, t // 3 + 2)
    part = visible(mask, causal, t, s, rows=middle)
    assert part is not None and torch.equal(part.expand_as(want[:, :, middle]), want[:, :, middle])
    empty = empty_rows(mask, causal, t, s)
    assert empty is not None and torch.equal(empty.expand(2, 3, t), ~want.any(-1))


def test_without_a_mask():
    assert visible(None, False, 3, 3) is None and empty_rows(None, True, 3, 3) is None
    assert as_list(visible(None, True, 2, 3)) == [[True, False, False], [True, True, False]]
    assert as_list(empty_rows(None, False, 3, 0)) == [True] * 3


def test_additive():
    mask = torch.tensor([True, False])
    assert additive(mask, torch.float64).tolist() == [0.0, -torch.inf]
    assert additive(mask, torch.float64).dtype == torch.float64
    numbers = torch.tensor([1.0, 2.0])
    assert additive(numbers, torch.float32) is numbers
    assert additive(numbers, torch.bfloat16).dtype == torch.bfloat16


def test_made_once_per_mask_and_dtype():
    mask = torch.rand(1, 1, 4, 4) > 0.5
    assert additive(mask, torch.float32) is additive(mask, torch.float32)
    assert additive(mask, torch.float32) is not additive(mask, torch.bfloat16)
    assert additive(mask, torch.float32) is not additive(mask.clone(), torch.float32)
    assert empty_rows(mask, True, 4, 4) is empty_rows(mask, True, 4, 4)
    square = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert decompose(square) is decompose(square) is not None


def test_a_mask_changed_in_place_is_seen():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    additive(mask, torch.float32)
    empty_rows(mask, False, 3, 3)
    mask[:, :, 1] = False
    assert additive(mask, torch.float32)[0, 0, 1].tolist() == [-torch.inf] * 3
    assert as_list(empty_rows(mask, False, 3, 3)) == [[[False, True, False]]]


def test_inference_masks_are_never_stale():
    with torch.inference_mode():
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        additive(mask, torch.float32)
        mask[:, :, 1] = False
        assert additive(mask, torch.float32)[0, 0, 1].tolist() == [-torch.inf] * 3


def test_nothing_keeps_a_mask_alive():
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    derived = weakref.ref(additive(mask, torch.float32)), weakref.ref(decompose(mask))
    empty_rows(mask, True, 5, 5)
    alive, known = weakref.ref(mask), len(masks._memo)
    del mask
    gc.collect()
    assert alive() is None and all(x() is None for x in derived)
    assert len(masks._memo) < known


@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans())
def test_decompose_finds_padding(t, padding, left):
    index = torch.arange(t)
    keys = torch.stack([index >= n if left else index < t - n for n in padding])[:, None, None]
    mask = keys & (index <= index[:, None])
    found = decompose(mask)
    assert found is not None and found.shape == (len(padding), 1, 1, t)
    assert torch.equal(found & (index <= index[:, None]), mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 4, 4, dtype=torch.bool),  # bidirectional
        torch.ones(1, 1, 4, 4, dtype=torch.bool).tril().triu(-1),  # a window
        torch.ones(1, 2, 4, 4, dtype=torch.bool).tril(),  # one per head
        torch.ones(1, 1, 3, 4, dtype=torch.bool).tril(1),  # after a cache
        torch.zeros(1, 1, 4, 4),
        torch.ones(4, 4, dtype=torch.bool).tril(),
        torch.ones(1, 1, 0, 0, dtype=torch.bool),
        torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta"),
    ],
)
def test_decompose_leaves_other_masks(mask):
    assert decompose(mask) is None


def test_least_numbers_are_hidden_exactly_and_once():
    low = torch.finfo(torch.float32).min
    mask = torch.tensor([[0.0, low], [low, low], [-3.0, low + 0.0]])
    exact = masks.hide_exactly(mask)
    assert exact.tolist() == [[0.0, -torch.inf], [-torch.inf, -torch.inf], [-3.0, -torch.inf]]
    assert masks.hide_exactly(mask) is exact
    boolean = torch.tensor([True, False])
    assert masks.hide_exactly(boolean) is boolean
