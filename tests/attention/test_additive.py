"""Additive attention: facts of its definition. Shapes, dtypes, padding and compilation are the contract's."""

from typing import Any

import pytest
import torch

from headwise.attention.additive import AdditiveAttention, weigh


def plus_three(module: Any, args: Any, scores: Any) -> Any:
    return scores + 3.0


def twice(module: Any, args: Any, scores: Any) -> Any:
    return scores * 2


def naive(module: AdditiveAttention, x, query, length):
    """One context from the equation, position by position."""
    scores = []
    for s in range(length):
        hidden = module.key_proj.weight @ x[s] + module.key_proj.bias
        if query is not None and module.query_proj is not None:
            hidden = hidden + module.query_proj.weight @ query
        scores.append(module.vector.weight[0] @ hidden.tanh())
    top = torch.stack(scores).exp()
    return sum(weight / top.sum() * x[s] for s, weight in enumerate(top)), top / top.sum()


@pytest.mark.parametrize("pair", [False, True])
def test_equals_a_loop_over_positions(pair):
    module = AdditiveAttention(6, 5, query_dim=4 if pair else None).double()
    x, query = torch.randn(3, 7, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    lengths = [7, 4, 1]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    context, weights = module.pool(x, mask, query if pair else None)
    for i, length in enumerate(lengths):
        expected, expected_weights = naive(module, x[i], query[i] if pair else None, length)
        torch.testing.assert_close(context[i], expected)
        torch.testing.assert_close(weights[i, :length], expected_weights)
        assert not weights[i, length:].any()


def test_a_query_per_row_equals_pooling_with_each():
    module = AdditiveAttention(6, 5, query_dim=4)
    x, query = torch.randn(2, 7, 6), torch.randn(2, 3, 4)
    out = module(x, query=query)
    for t in range(3):
        torch.testing.assert_close(out[:, t], module.pool(x, None, query[:, t])[0])
    assert not torch.allclose(out[:, 0], out[:, 1])


def test_a_causal_row_is_the_pool_of_its_past():
    module = AdditiveAttention(6, is_causal=True)
    x = torch.randn(2, 5, 6)
    out = module(x)
    for t in range(5):
        torch.testing.assert_close(out[:, t], module.pool(x[:, : t + 1])[0])


def test_a_row_that_sees_nothing_has_weights_and_gradients_of_zero():
    module = AdditiveAttention(6)
    x = torch.randn(2, 4, 6, requires_grad=True)
    context, weights = module.pool(x, torch.tensor([[True] * 4, [False] * 4]))
    assert (context[1] == 0).all() and (weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(context.sum(), x)
    assert torch.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


def test_weights_survive_large_scores():
    scores = torch.tensor([[[1e4, -torch.inf, 1e4], [-3e4, 0.0, -torch.inf]]])
    torch.testing.assert_close(weigh(scores), torch.tensor([[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]]))


def test_a_constant_at_the_score_point_changes_nothing():
    module, x = AdditiveAttention(6), torch.randn(2, 5, 6)
    before = module.pool(x)[1]
    handle = module.score_point.register_forward_hook(plus_three)
    torch.testing.assert_close(module.pool(x)[1], before)
    handle.remove()
    module.score_point.register_forward_hook(twice)
    assert not torch.allclose(module.pool(x)[1], before)


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="embed_dim 0"):
        AdditiveAttention(0)
    with pytest.raises(ValueError, match="query is given, but query_dim was None"):
        AdditiveAttention(4)(torch.randn(1, 3, 4), query=torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match="query is missing, but query_dim was 4"):
        AdditiveAttention(4, query_dim=4).pool(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="is_causal is about one sequence"):
        AdditiveAttention(4, query_dim=4, is_causal=True)(torch.randn(1, 3, 4), query=torch.randn(1, 2, 4))
