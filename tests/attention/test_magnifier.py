"""Magnified attention: one softmax over keys and the fine keys of preferred regions; what a row prefers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from headwise.attend.kernels import attention_with_lse
from headwise.attention.magnifier import (
    MagnifierAttention,
    fine_attention,
    magnified_attention,
    region_preference,
)
from headwise.attention.softmax import split_heads
from headwise.ops.regions import select_regions, spread_to_fine

FIXTURE = Path(__file__).parents[1] / "fixtures" / "scene_magnifier.safetensors"


def inputs(b=2, h=4, m=2, t=6, s=9, n=8, d=5, dtype=torch.float64, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q, k, v = 2 * make(b, h, t, d), make(b, m, s, d), make(b, m, s, d)
    return q, k, v, make(b, m, n, d), make(b, m, n, d), torch.rand(b, t, n, generator=generator) < 0.4


def one_softmax(q, k, v, k_fine, v_fine, select, mask=None, causal=False, scale=None):
    """From the definition: a row at a time over the concatenation."""
    b, h, t, d = q.shape
    out = torch.zeros(b, h, t, v.shape[-1], dtype=q.dtype)
    for item in range(b):
        for head in range(h):
            group = head // (h // k.shape[1])
            for row in range(t):
                shown = torch.ones(k.shape[2], dtype=torch.bool)
                if mask is not None:
                    shown = shown & mask[item, 0].expand(t, -1)[row]
                if causal:
                    shown = shown & (torch.arange(k.shape[2]) <= row)
                keys = torch.cat([k[item, group][shown], k_fine[item, group][select[item, row]]])
                values = torch.cat([v[item, group][shown], v_fine[item, group][select[item, row]]])
                if len(keys):
                    out[item, head, row] = (keys @ q[item, head, row] * (scale or d**-0.5)).softmax(0) @ values
    return out


@pytest.mark.parametrize("implementation", ["masked", "gather"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_merge_of_two_calls_is_one_softmax(implementation: Any, causal: bool):
    given: Any = inputs()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :2] = False  # padding on the left: causal rows 0 and 1 see no ordinary key
    expected = one_softmax(*given, mask=mask, causal=causal, scale=0.3)
    out = magnified_attention(*given, attention_mask=mask, causal=causal, scale=0.3, implementation=implementation)
    torch.testing.assert_close(out, expected)


def test_float32_agrees_with_float64_at_large_scores():
    q, k, v, k_fine, v_fine, select = inputs(t=17, s=31, n=12)
    exact = one_softmax(8 * q, k, v, k_fine, v_fine, select)
    single: Any = [x.float() for x in (8 * q, k, v, k_fine, v_fine)]
    low = magnified_attention(*single, select=select)
    torch.testing.assert_close(low, exact.float(), atol=1e-5, rtol=1e-5)


def test_selecting_nothing_is_plain_attention_bit_for_bit():
    q, k, v, k_fine, v_fine, select = (x.float() if x.is_floating_point() else x for x in inputs())
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    for way in ("masked", "gather"):
        none = magnified_attention(q, k, v, k_fine, v_fine, torch.zeros_like(select), implementation=way)
        assert torch.equal(none, plain)
    some = select.clone()
    some[:, 2] = False
    out = magnified_attention(q, k, v, k_fine, v_fine, some)
    assert torch.equal(out[:, :, 2], plain[:, :, 2]) and not torch.equal(out[:, :, 1], plain[:, :, 1])
    assert torch.equal(magnified_attention(q, k, v, k_fine, v_fine, select, alpha=0.0), plain)


def test_copies_of_the_coarse_keys_add_log_two_to_their_scores():
    q, k, v, *_ = inputs()
    coarse = torch.arange(2, 6)
    select = torch.ones(2, 6, 4, dtype=torch.bool)
    bias = torch.zeros(1, 1, 1, 9, dtype=q.dtype)
    bias[..., coarse] = torch.log(torch.tensor(2.0, dtype=q.dtype))
    doubled = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.expand(2, 4, 6, 9), enable_gqa=True)
    torch.testing.assert_close(magnified_attention(q, k, v, k[:, :, coarse], v[:, :, coarse], select), doubled)


def test_warm_up_is_a_blend():
    given = inputs()
    whole, plain = magnified_attention(*given), magnified_attention(*given, alpha=0.0)
    torch.testing.assert_close(magnified_attention(*given, alpha=0.25), 0.75 * plain + 0.25 * whole)


@pytest.mark.parametrize("implementation", ["masked", "gather"])
def test_gradients_reach_everything_and_are_right(implementation: Any):
    q, k, v, k_fine, v_fine, select = inputs(b=1, h=2, m=1, t=3, s=4, n=4, d=3)
    select[0, 1] = False
    tensors = [x.clone().requires_grad_() for x in (q, k, v, k_fine, v_fine)]

    def of(*x: Any):
        return magnified_attention(x[0], x[1], x[2], x[3], x[4], select, implementation=implementation)

    assert torch.autograd.gradcheck(of, tensors)


def test_a_key_that_nobody_selects_has_no_influence():
    q, k, v, k_fine, v_fine, select = inputs()
    select[..., 3] = False
    other, values = k_fine.clone(), v_fine.clone()
    other[:, :, 3], values[:, :, 3] = 90.0, 90.0
    same = magnified_attention(q, k, v, other, values, select)
    assert torch.equal(same, magnified_attention(q, k, v, k_fine, v_fine, select))


def test_decoding_reads_the_selected_keys_only(monkeypatch: pytest.MonkeyPatch):
    q, k, v, k_fine, v_fine, select = inputs(t=1, n=40)
    select[:] = False
    select[0, 0, [3, 7]], select[1, 0, [0, 1, 39]] = True, True
    seen = []

    def counted(q, k, v, **options):
        seen.append(k.shape[2])
        return attention_with_lse(q, k, v, **options)

    monkeypatch.setattr("headwise.attention.magnifier.attention_with_lse", counted)
    out = magnified_attention(q, k, v, k_fine, v_fine, select)
    assert seen == [9, 3]
    torch.testing.assert_close(out, one_softmax(q, k, v, k_fine, v_fine, select))


def test_preference_is_the_attention_to_the_coarse_columns():
    q, k, v, *_ = inputs()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., :3] = False
    _, lse = attention_with_lse(q, k, v, mask=mask, softcap=3.0)
    scores = 3.0 * ((q @ k.repeat_interleave(2, 1).mT * 5**-0.5) / 3.0).tanh()
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).sum(1)
    for shown in (mask[..., 2:6], torch.zeros(2, 1, 1, 4, dtype=q.dtype).masked_fill(~mask[..., 2:6], -torch.inf)):
        found = region_preference(q, k[:, :, 2:6], lse, mask=shown, softcap=3.0)
        torch.testing.assert_close(found, weights[..., 2:6])
    assert not region_preference(q.requires_grad_(), k[:, :, 2:6], lse).requires_grad
    blind = region_preference(q, k[:, :, 2:6], torch.full_like(lse, -torch.inf))
    assert not blind.any()


rows = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9)


@given(rows, st.floats(0, 0.98), st.floats(0, 0.98))
def test_a_larger_threshold_selects_fewer_and_the_best_always(row: list[float], one: float, other: float):
    preference = torch.tensor(row)
    low, high = sorted((one, other))
    few, many = select_regions(preference, high), select_regions(preference, low)
    assert not bool((few & ~many).any())
    if preference.max() > preference.min():
        assert bool(few[preference.argmax()]) and not bool(many[preference.argmin()])
    else:
        assert not many.any() and select_regions(preference, low, ties="all").all()


def test_the_threshold_is_96_of_255_and_heads_may_be_summed_or_averaged():
    row = torch.tensor([[0.0, 96.0, 97.0, 255.0]])
    assert select_regions(row).tolist() == [[False, False, True, True]]
    preference = torch.rand(3, 7, 16)
    assert torch.equal(select_regions(preference), select_regions(preference / 4 + 0.1))
    assert not torch.equal(preference > 0.376, preference / 4 > 0.376)  # an absolute threshold would tell them apart


def test_top_k_bounds_what_is_selected():
    row = torch.tensor([0.5, 0.9, 0.8, 0.9, 0.0])
    assert select_regions(row, top_k=2).tolist() == [False, True, False, True, False]
    assert select_regions(row, top_k=1).tolist() == [False, True, False, False, False]
    assert select_regions(row, 0.0, top_k=9).tolist() == [True, True, True, True, False]


def test_a_choice_is_one_of_its_fine_tokens():
    select = torch.tensor([[[True, False, True]]])
    assert spread_to_fine(select, torch.tensor([[2, 1, 0, 1]])).tolist() == [[[True, False, True, False]]]


def test_the_module_is_the_function_and_alone_it_is_attention():
    torch.manual_seed(0)
    layer = MagnifierAttention(16, 4, fine_dim=6, num_kv_heads=2, is_causal=True)
    x, fine, select = torch.randn(2, 5, 16), torch.randn(2, 8, 6), torch.rand(2, 5, 8) < 0.5
    select[:, 0] = False
    out = layer(x, fine, select)
    q, k, v = layer.qkv(x).split([16, 8, 8], -1)
    heads = [y.view(2, -1, n, 4).transpose(1, 2) for y, n in ((q, 4), (k, 2), (v, 2))]
    fines = [y.view(2, -1, 2, 4).transpose(1, 2) for y in (layer.k_fine(fine), layer.v_fine(fine))]
    parts: Any = [*heads, *fines]
    expected = layer.proj(one_softmax(*parts, select=select, causal=True).transpose(1, 2).reshape(2, 5, 16))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 1] = False
    changed = x.clone()
    changed[:, 1] = 40.0
    torch.testing.assert_close(layer(changed, fine, select, mask)[:, 2:], layer(x, fine, select, mask)[:, 2:])


def test_what_is_refused():
    q, k, v, k_fine, v_fine, select = inputs()
    with pytest.raises(ValueError, match=r"select has shape \(2, 6, 7\); expected \(2, 6, 8\)"):
        magnified_attention(q, k, v, k_fine, v_fine, select[..., :7])
    out, lse = attention_with_lse(q, k, v)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; expected 0"):
        fine_attention(q, k_fine, v_fine, select, out, lse, alpha=1.5)
    with pytest.raises(ValueError, match="there are no regions"):
        select_regions(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"threshold is 96\.0; expected 0 to below 1"):
        select_regions(torch.zeros(3), 96.0)
    with pytest.raises(ValueError, match="top_k is 0"):
        select_regions(torch.zeros(3), top_k=0)
    with pytest.raises(ValueError, match="heads must divide the width"):
        MagnifierAttention(10, 4)


def test_against_the_official_code():
    """Two of its layers (tests/oracles/scene_magnifier.py): what the first chooses, and the outputs of both."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    kept = load_file(FIXTURE)
    heads, length, start, regions, each = 4, kept["states"].shape[2], 15, 12, 4
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=heads))
    parent = torch.arange(regions).repeat_interleave(each)[None].expand(2, -1)
    cos, sin = rotary(kept["states"][0], torch.arange(length)[None])

    def projected(layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        return split_heads(x @ kept[f"{layer}.{name}.weight"].T, heads)

    def layer(number: int) -> list[torch.Tensor]:
        q, k, v = (projected(number, f"{name}_proj", kept["states"][number]) for name in "qkv")
        return [*apply_rotary_pos_emb(q, k, cos, sin), v]

    def mixed(number: int, out: torch.Tensor) -> torch.Tensor:
        return out.transpose(1, 2).flatten(2) @ kept[f"{number}.o_proj.weight"].T

    q, k, v = layer(0)
    out, lse = attention_with_lse(q, k, v, causal=True)
    torch.testing.assert_close(mixed(0, out), kept["out.0"], atol=1e-4, rtol=1e-4)
    preference = region_preference(q[:, :, start:], k[:, :, 3:start], lse[:, :, start:])
    select = torch.zeros_like(kept["select"])
    select[:, start:] = spread_to_fine(select_regions(preference, 96 / 255), parent)
    assert torch.equal(select, kept["select"])
    q, k, v = layer(1)
    k_fine = projected(1, "k_proj_hd", kept["fine"])
    at = 3 + parent  # fine tokens stand where their region does
    k_fine, _ = apply_rotary_pos_emb(k_fine, k_fine, cos[0][at], sin[0][at])
    found = magnified_attention(q, k, v, k_fine, projected(1, "v_proj_hd", kept["fine"]), select, causal=True)
    torch.testing.assert_close(mixed(1, found), kept["out.1"], atol=1e-4, rtol=1e-4)
    plain, _ = attention_with_lse(q, k, v, causal=True)
    assert (mixed(1, plain) - kept["out.1"])[:, start:].abs().max() > 0.1
