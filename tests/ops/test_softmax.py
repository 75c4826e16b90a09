"""Merging parts of a softmax equals the softmax of the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.ops.softmax import log_sum_exp, merge


def parts(scores, values, owner, count):
    """(outputs, log-masses) of each part, from the definition."""
    masked = [torch.where(owner == i, scores, -torch.inf) for i in range(count)]
    lses = [torch.logsumexp(x, -1) for x in masked]
    return [torch.softmax(x, -1).nan_to_num(0.0) @ values for x in masked], lses


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([1.0, 50.0, 1000.0]))
def test_merge_equals_the_whole(seed, count, loud):
    torch.manual_seed(seed)
    scores = torch.randn(2, 3, 7, dtype=torch.float64) * loud
    values = torch.randn(2, 7, 4, dtype=torch.float64)
    outs, lses = parts(scores, values, torch.randint(0, count, (7,)), count)
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ values)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_rows_without_any_key():
    out, lse = merge([torch.full((2, 3), torch.nan)] * 2, [torch.full((2,), -torch.inf)] * 2)
    assert not out.any() and lse.tolist() == [-torch.inf] * 2


def test_an_absent_part_leaves_the_other_bit_for_bit():
    out, mass = torch.randn(5, 3), torch.randn(5)
    got, lse = merge([out, torch.full((5, 3), torch.nan)], [mass, torch.full((5,), -torch.inf)])
    assert torch.equal(got, out) and torch.equal(lse, mass)


def test_an_endless_part_takes_the_row():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    out, lse = merge([a, b], [torch.tensor([torch.inf, 0.0]), torch.tensor([1e30, -torch.inf])])
    assert torch.equal(out, a) and lse.tolist() == [torch.inf, 0.0]
    assert torch.equal(merge([a, b], [torch.full((2,), torch.inf)] * 2)[0], (a + b) / 2)


def test_gradient():
    outs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    masses = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *masses))
    assert torch.autograd.gradgradcheck(lambda *x: merge(x[:3], x[3:]), (*outs, *masses))


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_no_nan_gradient_at_the_ends(value):
    outs = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    masses = [torch.tensor([value, value], requires_grad=True), torch.tensor([0.0, value], requires_grad=True)]
    out, lse = merge(outs, masses)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*outs, *masses))


def test_half_precision_rounds_once():
    outs = [torch.randn(50, 4).bfloat16() for _ in range(4)]
    masses = [torch.randn(50) for _ in range(4)]
    want = merge([x.double() for x in outs], [x.double() for x in masses])[0]
    got = merge(outs, masses)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.float().bfloat16())


def test_refusals():
    with pytest.raises(ValueError, match="0 outputs and 0 log-masses; give one of each"):
        merge([], [])
    with pytest.raises(ValueError, match="1 outputs and 2 log-masses"):
        merge([torch.zeros(1, 1)], [torch.zeros(1)] * 2)


def test_log_sum_exp_equals_torch_where_something_is_seen():
    x = torch.randn(4, 5, dtype=torch.float64).masked_fill(torch.rand(4, 5) > 0.6, -torch.inf)
    x[:, 0] = 0
    for dim in (0, -1):
        assert torch.equal(log_sum_exp(x, dim), x.logsumexp(dim))
        assert torch.equal(log_sum_exp(x, dim, keepdim=True), x.logsumexp(dim, keepdim=True))


def test_log_sum_exp_of_nothing_has_gradient_zero():
    x = torch.full((2, 3), -torch.inf, requires_grad=True)
    total = log_sum_exp(x)
    total.exp().sum().backward()
    assert total.tolist() == [-torch.inf] * 2 and x.grad is not None and not x.grad.any()
