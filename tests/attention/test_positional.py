"""Positional attention: weights that no input changes, against torch's fused attention and by routes set by hand."""

import copy

import pytest
import torch
from tests.compiling import assert_compiles
from torch.nn import functional as F

import headwise as hw
from headwise.attend.edits import Ablate
from headwise.attend.probes import Sink
from headwise.attention import PositionalAttention, positional_attention, positional_weights
from headwise.hf import probe

RNG = torch.Generator().manual_seed(0)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=dtype)


def module(**options) -> PositionalAttention:
    torch.manual_seed(0)
    made = PositionalAttention(12, 3, 10, **options)
    torch.nn.init.normal_(made.qk.bias) if made.qk.bias is not None else None
    return made.eval()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_fused_attention_over_expanded_positions(batched, scale):
    p_q, p_k = (some(*((4,) if batched else ()), 3, 7, 5) for _ in range(2))
    v = some(4, 3, 7, 6)
    q, k = (one.expand(4, 3, 7, 5) for one in (p_q, p_k))
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(positional_attention(p_q, p_k, v, scale=scale), expected, atol=1e-6, rtol=1e-5)
    mask = torch.rand(7, 7, generator=RNG) < 0.6
    mask[:, 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale, attn_mask=mask)
    torch.testing.assert_close(
        positional_attention(p_q, p_k, v, scale=scale, mask=mask), expected, atol=1e-6, rtol=1e-5
    )


def test_a_row_without_keys_is_zero():
    p = some(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False] * 3, [True] * 3])
    weights = positional_weights(p, p, mask=mask)
    assert not weights[:, 1].any() and torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0.0, 1.0]).expand(2, 3))


def test_weights_see_no_tokens():
    layer = module()
    x, y = some(2, 6, 12), some(2, 6, 12)
    with torch.no_grad():
        first = layer.attention_weights(6).clone()
        layer(x)
        layer(y)
        assert torch.equal(layer.attention_weights(6), first)
    x.requires_grad_()
    assert torch.autograd.grad(layer.attention_weights(6).sum() + 0 * x.sum(), x)[0].count_nonzero() == 0


def test_the_layer_is_linear_up_to_its_biases():
    layer = module().double()
    x, y, zero = (
        some(2, 5, 12, dtype=torch.float64),
        some(2, 5, 12, dtype=torch.float64),
        torch.zeros(2, 5, 12).double(),
    )
    both = layer(2 * x - 3 * y) - layer(zero)
    torch.testing.assert_close(both, 2 * (layer(x) - layer(zero)) - 3 * (layer(y) - layer(zero)))


def test_by_loops():
    layer, x = module(), some(2, 4, 12)
    qk = layer.qk(torch.eye(4, 10)).detach()
    q, k = qk[:, :30].view(4, 3, 10), qk[:, 30:].view(4, 3, 10)
    v = layer.v_proj(x).detach().view(2, 4, 3, 4)
    out = torch.zeros(2, 4, 3, 4)
    for head in range(3):
        for i in range(4):
            row = torch.stack([(q[i, head] * k[j, head]).sum() / 10**0.5 for j in range(4)]).softmax(0)
            for j in range(4):
                out[:, i, head] += row[j] * v[:, j, head]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(2)), atol=1e-5, rtol=1e-4)


def test_queries_and_keys_are_as_wide_as_positions():
    assert module().qk.out_features == 2 * 3 * 10 and module(qk_dim=4).qk.out_features == 2 * 3 * 4


def test_positions_may_be_shared_or_each_items_own():
    layer, x, positions = module(), some(2, 5, 12), some(5, 10)
    shared = layer(x, positions)
    torch.testing.assert_close(layer(x, positions.expand(2, 5, 10)), shared, atol=1e-6, rtol=1e-5)
    other = layer(x, torch.stack([positions, some(5, 10)]))
    torch.testing.assert_close(other[0], shared[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(other[1], shared[1])
    assert layer.attention_weights(positions).shape == (3, 5, 5)


def test_kept_weights_follow_parameters_and_encodings():
    layer, positions = module(), some(5, 10)
    with torch.no_grad():
        first = layer.attention_weights(positions)
        assert layer.attention_weights(positions) is first
        positions[0] += 1
        second = layer.attention_weights(positions)
        assert not torch.equal(second, first)
        layer.qk.weight.mul_(2)
        third = layer.attention_weights(positions)
        assert not torch.equal(third, second)
        assert not torch.equal(layer.attention_weights(some(5, 10)), third)
        state = copy.deepcopy(layer.state_dict())
        state["qk.weight"] *= 3
        layer.load_state_dict(state)
        assert not torch.equal(layer.attention_weights(positions), third)
        assert layer.double().attention_weights(5).dtype == torch.float64
    assert layer.attention_weights(5).requires_grad  # nothing is kept where a gradient is wanted
    layer.train()
    with torch.no_grad():
        assert layer.attention_weights(5) is not layer.attention_weights(5)


def test_padding_changes_nothing():
    layer, x = module(), some(2, 8, 12)
    mask = torch.arange(8)[None].expand(2, 8) < 5
    torch.testing.assert_close(layer(x, attention_mask=mask)[:, :5], layer(x[:, :5]), atol=1e-5, rtol=1e-4)


def test_heads_are_read_and_edited():
    layer, x = module(is_causal=True), some(2, 6, 12)
    sink = Sink()
    with probe(layer, sink):
        layer(x)
    expected = layer.attention_weights(6)[:, 1:, 0].mean(1)
    torch.testing.assert_close(sink.scores()["", 0].float(), expected.detach(), atol=1e-5, rtol=1e-4)
    with hw.steer(layer, Ablate(heads="0.1", mode="uniform")):
        even = layer(x)
    assert not torch.allclose(even, layer(x))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    layer, x = module(is_causal=causal).double(), some(1, 3, 12, dtype=torch.float64).requires_grad_()
    positions = some(3, 10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, positions))


def test_refusals():
    layer, x = module(), some(2, 5, 12)
    with pytest.raises(ValueError, match=r"positions are \(4, 10\) for x of \(2, 5, 12\); expected \[5, 10\]"):
        layer(x, some(4, 10))
    with pytest.raises(ValueError, match=r"or \[2, 5, 10\]"):
        layer(x, some(3, 5, 10))
    with pytest.raises(ValueError, match="11 tokens and pos_dim 10"):
        layer(some(2, 11, 12))
    with pytest.raises(ValueError, match="pos_dim 0"):
        PositionalAttention(12, 3, 0)
    with pytest.raises(ValueError, match="heads must divide the width"):
        PositionalAttention(12, 5, 4)
    with pytest.raises(ValueError, match="p_k has 2 heads of 3 positions, v 2 of 4"):
        positional_attention(some(2, 3, 5), some(2, 3, 5), some(1, 2, 4, 6))


@pytest.mark.slow
def test_it_compiles_whole():
    layer, x = module(), some(2, 5, 12)
    assert_compiles(layer, x, fullgraph=True)
