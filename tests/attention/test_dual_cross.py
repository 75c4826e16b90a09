"""Rollout, selection and the two cross-attentions: limits, loops written from the equations, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import headwise as hw
from headwise.attend import Ablate
from headwise.attend.step import Step
from headwise.attention import SoftmaxAttention
from headwise.attention.dual_cross import (
    GlobalLocalCrossAttention,
    PairwiseCrossAttention,
    attention_rollout,
    check_partner,
    global_local_cross_attention,
    pairwise_cross_attention,
    rollout_row,
    top_response_group,
    top_response_tokens,
)

DOUBLE = torch.float64


def maps(layers: int = 3, b: int = 2, h: int = 3, t: int = 6) -> list[torch.Tensor]:
    return [torch.randn(b, h, t, t, dtype=DOUBLE).mul(3).softmax(-1) for _ in range(layers)]


def qkv(b: int = 3, h: int = 2, t: int = 7, d: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (3 * torch.randn(b, h, t, d, dtype=DOUBLE) for _ in range(3))
    return q, k, v


# Rollout


def test_rollout_is_the_product_with_the_last_layer_on_the_left():
    given_maps, t = maps(), 6
    for item in range(2):
        factors = [
            0.5 * (m[item, 0] + m[item, 1] + m[item, 2]) / 3 + 0.5 * torch.eye(t, dtype=DOUBLE) for m in given_maps
        ]
        expected = factors[2] @ factors[1] @ factors[0]
        torch.testing.assert_close(attention_rollout(given_maps)[item], expected)
        assert not torch.allclose(factors[0] @ factors[1] @ factors[2], expected), "the order would not be seen"


def test_rollout_rows_sum_to_one_and_limits():
    given_maps = maps()
    for how in ("mean", "max", "min"):
        rows = attention_rollout(given_maps, 0.3, how).sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
    identity = torch.eye(6, dtype=DOUBLE).expand(2, 3, 6, 6)
    assert torch.equal(attention_rollout([identity] * 4), identity[:, 0])
    one = attention_rollout(given_maps[:1])
    torch.testing.assert_close(one, 0.5 * given_maps[0].mean(1) + 0.5 * torch.eye(6, dtype=DOUBLE))
    torch.testing.assert_close(attention_rollout(given_maps, 1.0), identity[:, 0])


@pytest.mark.parametrize("how", ["mean", "max", "min"])
def test_a_row_vector_gives_the_row_of_the_matrix(how, monkeypatch):
    monkeypatch.setattr("headwise.attention.dual_cross.ROWS", 4)  # several blocks of rows
    pairs = [(torch.randn(2, 3, 6, 4, dtype=DOUBLE), torch.randn(2, 3, 6, 4, dtype=DOUBLE), 0.7) for _ in range(4)]
    given_maps = [(q @ k.mT * scale).softmax(-1) for q, k, scale in pairs]
    for row in (0, 5):
        expected = attention_rollout(given_maps, 0.4, how)[:, row]
        torch.testing.assert_close(rollout_row(given_maps, row=row, residual=0.4, head_reduce=how), expected)
        torch.testing.assert_close(rollout_row(pairs, row=row, residual=0.4, head_reduce=how), expected)


def test_the_last_layer_alone_is_another_answer():
    """The weaker ablation of the paper must not be what the rollout gives."""
    given_maps = maps()
    assert not torch.allclose(rollout_row(given_maps), rollout_row(given_maps[-1:]))


def test_no_gradient_flows_through_the_response():
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    assert not rollout_row([(q, q, 1.0)]).requires_grad


def test_rollout_refusals():
    with pytest.raises(ValueError, match=r"output_attentions=True.*\(q, k, scale\)"):
        attention_rollout([])
    with pytest.raises(ValueError, match=r"residual is 1\.5"):
        rollout_row(maps(), residual=1.5)
    with pytest.raises((ValueError, TypeError), match="'median'"):
        attention_rollout(maps(), head_reduce="median")  # pyright: ignore[reportArgumentType]


# Selection


@given(st.integers(1, 40), st.floats(0.001, 1.0), st.integers(1, 3))
def test_the_number_of_tokens(n, ratio, prefix):
    response = torch.rand(2, n + prefix)
    chosen = top_response_tokens(response, ratio, num_prefix_tokens=prefix)
    assert chosen.shape == (2, max(1, math.ceil(round(ratio * n, 9))))
    assert int(chosen.min()) >= prefix and int(chosen.max()) < n + prefix
    assert (chosen[:, 1:] > chosen[:, :-1]).all()
    for row, kept in zip(response, chosen, strict=True):
        rest = [j for j in range(prefix, n + prefix) if j not in kept.tolist()]
        assert not rest or row[rest].max() <= row[kept].min()


def test_ten_per_cent_of_seventy_is_seven():
    """0.1 * 70 is 7.000000000000001 in floating point."""
    assert top_response_tokens(torch.rand(1, 71), 0.1).shape[1] == 7


def test_prefix_tokens_are_never_selected():
    response = torch.tensor([[0.9, 0.8, 0.1, 0.3, 0.2]])
    assert top_response_tokens(response, 0.5).tolist() == [[1, 3]]
    assert top_response_tokens(response, 0.5, num_prefix_tokens=2).tolist() == [[3, 4]]
    whole = torch.rand(1, 5, 5)
    whole[:, 0] = response
    assert top_response_tokens(whole, 0.5).tolist() == [[1, 3]]
    assert top_response_tokens(torch.ones(1, 5), 0.5).tolist() == [[1, 2]], "ties go to the earlier token"


def test_the_selection_as_a_key_group():
    response = torch.tensor([[0.9, 0.8, 0.1, 0.3], [0.1, 0.1, 0.7, 0.2]])
    members = top_response_group(response, 0.6).members(Step.of(2, 4, response.device))
    assert members.tolist() == [[False, True, False, True], [False, False, True, True]]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        top_response_tokens(torch.rand(1, 5), ratio)


def test_a_sequence_without_patches_is_refused():
    with pytest.raises(ValueError, match="1 tokens with num_prefix_tokens 1"):
        top_response_tokens(torch.rand(1, 1), 0.5)
    with pytest.raises(ValueError, match="num_prefix_tokens 0"):
        top_response_tokens(torch.rand(1, 4), 0.5, num_prefix_tokens=0)


# The two attentions


def loop(q, keys, values, scale):
    """Rows of softmax attention one by one."""
    out = torch.zeros(len(q), values.shape[1], dtype=DOUBLE)
    for i, row in enumerate(q):
        scores = [float(row @ key) * scale for key in keys]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for weight, value in zip(weights, values, strict=True):
            out[i] += weight / sum(weights) * value
    return out


def test_pairs_are_one_softmax_over_both_images():
    q, k, v = qkv()
    partner = torch.tensor([2, 0, 1])
    out = pairwise_cross_attention(q, k, v, partner)
    for b in range(3):
        for h in range(2):
            keys, values = torch.cat([k[b, h], k[partner[b], h]]), torch.cat([v[b, h], v[partner[b], h]])
            torch.testing.assert_close(out[b, h], loop(q[b, h], keys, values, 0.5))
    halves = (loop(q[0, 0], k[0, 0], v[0, 0], 0.5) + loop(q[0, 0], k[2, 0], v[2, 0], 0.5)) / 2
    assert not torch.allclose(halves, out[0, 0]), "halves with a softmax each are another attention"


def test_an_image_paired_with_itself_gets_plain_attention():
    q, k, v = qkv()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(pairwise_cross_attention(q, k, v, torch.arange(3)), plain, atol=1e-12, rtol=1e-12)
    close = pairwise_cross_attention(q.float(), k.float(), v.float(), torch.arange(3)) - plain.float()
    assert float(close.abs().max()) <= 1e-5


def test_a_partner_whose_keys_are_hidden_changes_nothing():
    q, k, v = qkv()
    real = torch.ones(3, 7, dtype=torch.bool)
    real[2] = False
    out = pairwise_cross_attention(q, k, v, torch.tensor([2, 0, 1]), mask=real)
    torch.testing.assert_close(out[0], torch.nn.functional.scaled_dot_product_attention(q, k, v)[0])


def test_local_rows_are_rows_of_the_whole():
    q, k, v = qkv()
    index = torch.tensor([[0, 3], [0, 6], [0, 1]])
    out = global_local_cross_attention(q, k, v, index)
    for b in range(3):
        for h in range(2):
            torch.testing.assert_close(out[b, h], loop(q[b, h, index[b]], k[b, h], v[b, h], 0.5))
    every = global_local_cross_attention(q, k, v, torch.arange(7).expand(3, 7))
    torch.testing.assert_close(every, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_gradients_are_right():
    q, k, v = (x[:2, :1, :3].clone().requires_grad_() for x in qkv())
    partner, index = torch.tensor([1, 0]), torch.tensor([[0, 2], [0, 1]])
    assert torch.autograd.gradcheck(lambda q, k, v: pairwise_cross_attention(q, k, v, partner), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: global_local_cross_attention(q, k, v, index), (q, k, v))


@pytest.mark.parametrize(
    ("partner", "said"),
    [
        ([0, 3, 1], "values from 0 to 3"),
        ([0, -1, 1], "values from -1 to 1"),
        ([0, 0, 1], "2 different ones"),
        ([0, 1], r"shape \(2,\)"),
    ],
)
def test_a_partner_that_is_no_permutation_is_refused(partner, said):
    with pytest.raises(ValueError, match=said):
        check_partner(torch.tensor(partner), 3)


def test_modules_share_softmax_attentions_weights():
    plain, pair, local = SoftmaxAttention(32, 4), PairwiseCrossAttention(32, 4), GlobalLocalCrossAttention(32, 4)
    pair.load_state_dict(plain.state_dict())
    local.load_state_dict(plain.state_dict())
    x, index = torch.randn(3, 9, 32), torch.tensor([[0, 4], [0, 8], [0, 1]])
    torch.testing.assert_close(pair(x), plain(x))
    torch.testing.assert_close(pair(x, torch.arange(3)), plain(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(local(x, index), plain(x).gather(1, index[..., None].expand(-1, -1, 32)))
    q, k, v = (part.view(3, 9, 4, 8).transpose(1, 2) for part in pair.qkv(x).chunk(3, -1))
    partner = torch.tensor([1, 2, 0])
    heads = pairwise_cross_attention(q, k, v, partner).transpose(1, 2).flatten(2)
    torch.testing.assert_close(pair(x, partner), pair.proj(heads))
    assert not torch.allclose(pair(x, partner), plain(x), atol=1e-3)


def test_padding_reaches_neither_image_of_a_pair():
    layer, x = PairwiseCrossAttention(32, 4), torch.randn(2, 6, 32)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    partner, other = torch.tensor([1, 0]), x.clone()
    other[1, 4:] = 40.0
    torch.testing.assert_close(layer(other, partner, real)[0], layer(x, partner, real)[0])
    assert not torch.allclose(layer(other, partner)[0], layer(x, partner)[0])


@pytest.mark.parametrize("layer", [PairwiseCrossAttention(32, 4), GlobalLocalCrossAttention(32, 4)])
def test_heads_are_read_and_changed_with_pairs_and_selections(layer):
    x, given = torch.randn(2, 5, 32), torch.tensor([1, 0])
    if isinstance(layer, GlobalLocalCrossAttention):
        given = torch.tensor([[0, 2], [0, 3]])
    plain = layer(x, given)
    with hw.steer(layer, Ablate(heads="0.1", mode="zero")):
        cut = layer(x, given)
    with torch.no_grad():
        kept = layer.proj.weight.clone()
        layer.proj.weight[:, 8:16] = 0
        expected = layer(x, given)
        layer.proj.weight.copy_(kept)
    torch.testing.assert_close(cut, expected)
    with hw.steer(layer, Ablate(mode="uniform")):
        assert not torch.allclose(layer(x, given), plain)
    assert torch.equal(layer(x, given), plain)
