"""ReLU attention: facts of its definition. Shapes, dtypes, padding and compilation are the contract's."""

import pytest
import torch

from headwise.attention.relu import ReluAttention, relu_attention


def naive(q, k, v):
    out = torch.zeros_like(q)
    for t in range(q.shape[2]):
        for j in range(t + 1):
            score = (q[:, :, t] * k[:, :, j]).sum(-1) * q.shape[-1] ** -0.5
            out[:, :, t] += score.clamp_min(0)[..., None] / (t + 1) * v[:, :, j]
    return out


def test_equals_a_loop_over_tokens():
    q, k, v = (torch.randn(2, 3, 11, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(relu_attention(q, k, v), naive(q, k, v))


def test_grouped_keys_equal_repeated_keys():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    repeated = relu_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(relu_attention(q, k, v), repeated)


def test_negative_scores_give_zeros_and_rows_may_sum_above_one():
    ones = torch.ones(1, 1, 5, 4)
    assert (relu_attention(ones, -ones, ones) == 0).all()
    assert (relu_attention(ones * 3, ones, ones) > 1).all()


def test_padding_is_neither_seen_nor_counted():
    layer = ReluAttention(16, 4, num_kv_heads=2)
    x = torch.randn(1, 7, 16)
    mask = torch.tensor([[False, False, True, True, True, True, True]])
    torch.testing.assert_close(layer(x, mask)[:, 2:], layer(x[:, 2:]))


def test_new_rows_on_a_cache_see_all_of_it():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    torch.testing.assert_close(relu_attention(q[:, :, 6:], k, v), relu_attention(q, k, v)[:, :, 6:])


def test_refusals_name_the_shapes():
    with pytest.raises(ValueError, match="do not fit"):
        relu_attention(torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    with pytest.raises(ValueError, match="embed_dim 10, num_heads 3"):
        ReluAttention(10, 3)
