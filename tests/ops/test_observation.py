"""What the last queries tell: the definition by loops in float64, ends, padding, and what is kept of a text."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.ops.observation import (
    head_distance,
    kept_positions,
    observed_attention,
    semantic_vectors,
    smooth_scores,
)

D = torch.float64


def qkv(b: int, h: int, n: int, s: int, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(b, h, s, d, generator=generator, dtype=D)
    k, v = (torch.randn(b, n, s, d, generator=generator, dtype=D) for _ in range(2))
    return q, k, v


def by_loops(q: Tensor, k: Tensor, window: int, real: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Row after row from the equation: softmax, mean over the real rows of the window and over the group."""
    b, h, s, _ = q.shape
    n = k.shape[1]
    found = torch.zeros(b, n, s, dtype=D)
    for row in range(b):
        rows = [t for t in range(max(0, s - window), s) if real[row, t]]
        for head in range(h):
            for t in rows:
                scores = {}
                for j in range(t + 1):
                    if real[row, j]:
                        score = float(q[row, head, t] @ k[row, head * n // h, j]) * scale
                        scores[j] = math.exp(score if softcap is None else softcap * math.tanh(score / softcap))
                for j, weight in scores.items():
                    found[row, head * n // h, j] += weight / sum(scores.values()) / len(rows) / (h // n)
    return found


@given(
    n=st.integers(1, 3), groups=st.integers(1, 2), s=st.integers(1, 9), window=st.integers(1, 12),
    pads=st.lists(st.integers(0, 8), min_size=2, max_size=2), softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_observed_attention_is_its_definition(n, groups, s, window, pads, softcap):
    q, k, _ = qkv(2, n * groups, n, s)
    real = torch.arange(s) >= torch.tensor([min(pad, s - 1) for pad in pads])[:, None]
    found = observed_attention(q[:, :, -window:], k, scale=0.7, softcap=softcap, real=real)
    torch.testing.assert_close(found, by_loops(q, k, window, real, 0.7, softcap))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, n, dtype=D))
    if bool(real.all()):
        torch.testing.assert_close(observed_attention(q[:, :, -window:], k, scale=0.7, softcap=softcap), found)


def test_a_whole_window_without_smoothing_is_the_true_map_times_the_values():
    """t = N, no pooling, window N: v_j is the column mean of the attention map times V."""
    q, k, v = qkv(2, 6, 3, 17)
    scores = q.view(2, 3, 2, 17, 4) @ k[:, :, None].mT / 2
    scores = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf)
    wanted = (scores.softmax(-1).mean((2, 3))[:, :, None] @ v)[:, :, 0]
    for window in (17, 100):  # more queries than there are: all of them
        found = semantic_vectors(q, k, v, window=window, top=None, pool=1)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(semantic_vectors(q, k, v, window=17, top=17, pool=1), found)


def test_only_the_top_keys_count():
    q, k, v = qkv(1, 2, 2, 20)
    scores = smooth_scores(observed_attention(q[:, :, -5:], k), 3)
    wanted = torch.zeros(1, 2, 4, dtype=D)
    for head in range(2):
        best = sorted(range(20), key=lambda j: -float(scores[0, head, j]))[:6]
        for j in best:
            wanted[0, head] += scores[0, head, j] * v[0, head, j]
    torch.testing.assert_close(semantic_vectors(q, k, v, window=5, top=6, pool=3), wanted)


def test_distances_depend_on_norms_unless_they_are_taken_away():
    """The paper does not normalise; a head with larger values is then farther."""
    q, k, v = qkv(1, 4, 4, 30)
    v[:, 2] *= 50
    raw, unit = (semantic_vectors(q, k, v, normalize=normalize) for normalize in (False, True))
    assert head_distance(raw)[0].argmax() == 2
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(1, 4, dtype=D))
    v[:, 2] /= 50
    torch.testing.assert_close(semantic_vectors(q, k, v, normalize=True), unit)
    centre = raw.mean(1)
    torch.testing.assert_close(head_distance(raw)[0, 1], (raw[0, 1] - centre[0]).norm())


def test_smoothing_at_the_ends():
    scores = torch.tensor([[[3.0, 0, 0, 0, 0, 3.0]]], dtype=D)
    assert torch.equal(smooth_scores(scores, 1), scores)
    assert smooth_scores(scores, 3)[0, 0].tolist() == [1.5, 1, 0, 0, 1, 1.5]
    assert smooth_scores(scores, 3, count_include_pad=True)[0, 0].tolist() == [1, 1, 0, 0, 1, 1]
    # A text that begins after padding is smoothed as it would be alone.
    padded = torch.cat([torch.full((1, 1, 3), 9.0, dtype=D), scores], 2)
    real = torch.arange(9)[None] >= 3
    for include in (False, True):
        found = smooth_scores(padded, 3, real=real, count_include_pad=include)[..., 3:]
        torch.testing.assert_close(found, smooth_scores(scores, 3, count_include_pad=include))


@given(
    s=st.integers(1, 14), pads=st.integers(0, 6), sink=st.integers(0, 4), recent=st.integers(0, 5),
    more=st.integers(0, 9), seed=st.integers(0, 5),
)  # fmt: skip
def test_kept_positions_are_sinks_recent_and_best(s, pads, sink, recent, more, seed):
    pads = min(pads, s - 1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, 2, s), generator=generator).double()  # many equal ones
    real = torch.arange(s) >= torch.tensor([[0], [pads]])
    keep = [min(length, sink + recent + more) for length in (s, s - pads)]
    found = kept_positions(scores, keep, sink=sink, recent=recent, real=real)
    assert found.shape == (2, 2, max(keep))
    for row in range(2):
        ids = [j for j in range(s) if real[row, j]]
        always = set(ids[:sink]) | set(ids[len(ids) - recent :])
        for head in range(2):
            rest = sorted(set(ids) - always, key=lambda j: (-float(scores[row, head, j]), j))
            wanted = sorted(always | set(rest[: keep[row] - len(always)]))
            assert found[row, head].tolist() == wanted + [-1] * (max(keep) - len(wanted))
    if bool(real.all()):
        assert torch.equal(kept_positions(scores, keep, sink=sink, recent=recent), found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: observed_attention(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 4, 4)), "5 queries but 4 keys"),
        (
            lambda: observed_attention(torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 4, 4)),
            "3 query heads over 2 key heads",
        ),
        (lambda: smooth_scores(torch.zeros(1, 1, 4), 2), "kernel is 2; expected an odd number of keys"),
        (lambda: smooth_scores(torch.zeros(1, 1, 4), 0), "kernel is 0"),
        (lambda: semantic_vectors(*qkv(1, 1, 1, 4), window=0), "window is 0 and top 256; expected 1 or more"),
        (lambda: semantic_vectors(*qkv(1, 1, 1, 4), top=0), "window is 32 and top 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
