"""Channel attention: identities, the roles of q, k and v, and what padding may not do."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import headwise as hw
from headwise.attend import Ablate
from headwise.attention import ChannelAttention, channel_attention


def tensors(h: int = 3, t: int = 20, d: int = 8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, t, d, generator=generator, dtype=torch.float64) for _ in range(3)]


def by_loops(q, k, v, scale):
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[3]):
                weights = torch.stack(
                    [(q[b, h, :, i] * k[b, h, :, j]).sum() * scale for j in range(q.shape[3])]
                ).softmax(0)
                out[b, h, :, i] = sum(w * v[b, h, :, j] for j, w in enumerate(weights))
    return out


@pytest.mark.parametrize(("scale", "factor"), [(None, 8**-0.5), ("tokens", 20**-0.5), (0.3, 0.3)])
def test_equals_the_loops_and_attention_on_transposed_tensors(scale, factor):
    q, k, v = tensors()
    ours = channel_attention(q, k, v, scale=scale)
    torch.testing.assert_close(ours, by_loops(q, k, v, factor), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours, scaled_dot_product_attention(q.mT, k.mT, v.mT, scale=factor).mT)


def test_permuting_tokens_permutes_outputs():
    q, k, v = tensors()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = channel_attention(q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(moved, channel_attention(q, k, v)[:, :, order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("variant", "factor"), [("davit", 2.0), ("florence2", 2**0.5)])
def test_what_doubling_every_token_does_to_the_logits(variant, factor):
    layer = ChannelAttention(16, 2, variant=variant).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    if variant == "davit":
        plain = channel_attention(k * factor, v, q)
    else:
        plain = channel_attention(q * factor * 7**-0.5, k, v, scale=1.0)
    expected = layer.proj(plain.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x.repeat_interleave(2, 1))[:, ::2], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("variant", "part"), [("davit", 0), ("florence2", 2)])
def test_groups_of_one_channel_hand_their_values_through(variant, part):
    layer = ChannelAttention(6, 6, variant=variant).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    value = layer.qkv(x)[..., 6 * part : 6 * part + 6]
    torch.testing.assert_close(layer(x), layer.proj(value), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("variant", ["davit", "florence2"])
def test_padding_changes_nothing(variant):
    torch.manual_seed(0)
    layer = ChannelAttention(16, 2, variant=variant)
    x = torch.randn(1, 7, 16)
    padded = torch.cat([x, 30 * torch.randn(1, 4, 16)], 1)
    mask = torch.arange(11)[None] < 7
    torch.testing.assert_close(layer(padded, mask)[:, :7], layer(x), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(layer(padded)[:, :7], layer(x), atol=1e-2)


def test_maps_are_flattened_and_narrow_types_are_summed_in_float32():
    layer = ChannelAttention(16, 2)
    x = torch.randn(2, 5, 6, 16)
    torch.testing.assert_close(layer(x), layer(x.flatten(1, 2)).view(x.shape))
    q, k, v = (y.float() for y in tensors(t=4000))
    low = channel_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.01)
    full = channel_attention(q, k, v, scale=0.01)
    assert (low.float() - full).norm() < 0.02 * full.norm()


def test_groups_are_heads():
    layer = ChannelAttention(16, 4).eval()
    x = torch.randn(1, 5, 16)
    with hw.steer(layer, Ablate(heads="0.2", mode="zero")):
        out = layer(x)
    with torch.no_grad():
        layer.proj.weight[:, 8:12] = 0
    torch.testing.assert_close(out, layer(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="scale is 'heads'"):
        channel_attention(*tensors(), scale="heads")
    with pytest.raises(ValueError, match="embed_dim 16, num_heads 3"):
        ChannelAttention(16, 3)
    with pytest.raises(ValueError, match="variant is 'v2'"):
        ChannelAttention(16, 4, variant="v2")
