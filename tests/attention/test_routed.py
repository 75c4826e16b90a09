"""Computing only the chosen heads: the same numbers as computing all and multiplying, and that much less work."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import routed
from headwise.attention.routed import pays_to_route, routed_attention
from headwise.ops.counting import _FORMULAS


def inputs(b=2, h=8, n=4, t=11, s=None, d=6, e=5, shared=2, k=3, dtype=torch.float32, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    gates = make(b, t, h).exp()
    lowest = gates[..., shared:].argsort(-1)[..., : h - shared - k] + shared
    gates = gates.scatter(-1, lowest, 0.0)
    s = t if s is None else s
    return make(b, h, t, d), make(b, n, s, d), make(b, n, s, e), gates


def materialised(q, k, v, gates, mask=None, causal=False, scale=None):
    """From the definition, in float64, a head at a time."""
    b, h, t, d = q.shape
    out = torch.zeros(b, t, h, v.shape[-1], dtype=torch.float64)
    for item in range(b):
        for head in range(h):
            key = head // (h // k.shape[1])
            scores = q[item, head].double() @ k[item, key].double().T * (d**-0.5 if scale is None else scale)
            if mask is not None:
                shown = mask.expand(b, h, t, k.shape[2])[item, head]
                scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            found = scores.softmax(-1).nan_to_num() @ v[item, key].double()
            out[item, :, head] = found * gates[item, :, head, None].double()
    return out


def key_mask(b, s):
    mask = torch.ones(b, 1, 1, s, dtype=torch.bool)
    mask[0, ..., :3] = False
    return mask


MASKS = {
    "none": lambda b, h, t, s: None,
    "keys": lambda b, h, t, s: key_mask(b, s),
    "rows": lambda b, h, t, s: torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(1)) > 0.4,
    "heads": lambda b, h, t, s: torch.rand(1, h, t, s, generator=torch.Generator().manual_seed(2)) > 0.4,
    "causal and padding": lambda b, h, t, s: key_mask(b, s) & torch.ones(t, s, dtype=torch.bool).tril(),
    "additive": lambda b, h, t, s: torch.randn(t, s, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["dense", "sparse"])
def test_it_is_its_definition(mask, causal, implementation):
    if causal and mask not in ("none", "keys"):
        return
    q, k, v, gates = inputs()
    shown = MASKS[mask](2, 8, 11, 11)
    wanted = materialised(q, k, v, gates, shown, causal)
    found = routed_attention(q, k, v, gates, mask=shown, causal=causal, implementation=implementation)
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)


@given(st.data())
def test_sparse_is_dense_for_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    n, group = draw(1, 3), draw(1, 3)
    h = n * group
    shared = draw(0, h)
    k = draw(1 if shared < h else 0, h - shared)
    t = draw(1, 9)
    causal = data.draw(st.booleans())
    s = t if causal else draw(1, 9)
    q, key, v, gates = inputs(draw(1, 2), h, n, t, s, shared=shared, k=k, dtype=torch.float64, seed=draw(0, 99))
    dense = routed_attention(q, key, v, gates, causal=causal, implementation="dense")
    sparse = routed_attention(q, key, v, gates, causal=causal, implementation="sparse")
    torch.testing.assert_close(sparse, dense)
    assert not sparse[gates == 0].any()


def test_causal_rows_over_many_blocks(monkeypatch):
    monkeypatch.setattr(routed, "CAUSAL_BLOCK", 4)
    q, k, v, gates = inputs(t=50)
    for mask in (None, key_mask(2, 50)):
        found = routed_attention(q, k, v, gates, mask=mask, causal=True, implementation="sparse")
        torch.testing.assert_close(found.double(), materialised(q, k, v, gates, mask, True), atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_the_dense_layer_where_a_gate_is_open():
    given = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
    upstream = torch.randn(2, 11, 8, 5, dtype=torch.float64)

    def gradients(implementation):
        out = routed_attention(*given, causal=True, implementation=implementation)
        return torch.autograd.grad((out * upstream).sum(), given)

    for name, dense, sparse in zip("qkvg", gradients("dense"), gradients("sparse"), strict=True):
        if name == "g":  # a closed gate has a gradient only where its head was computed
            dense = dense * (given[3] != 0)
        torch.testing.assert_close(sparse, dense)


def test_one_token_skips_key_heads_that_nobody_reads():
    """Decoding: keys of unchosen groups may hold anything, NaN among it."""
    q, k, v, gates = inputs(b=1, h=6, n=3, t=1, s=9, shared=0, k=2)
    gates[:] = torch.tensor([1.0, 1, 0, 0, 1, 0])
    wanted = materialised(q, k, v, gates)
    k[:, 1], v[:, 1] = torch.nan, torch.nan
    found = routed_attention(q, k, v, gates, implementation="sparse")
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)


def products(implementation, causal=False):
    q, k, v, gates = inputs(b=1, h=8, n=8, t=64, d=8, e=8, shared=2, k=2)
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        routed_attention(q, k, v, gates, causal=causal, implementation=implementation)
    return counter.get_total_flops()


def test_work_falls_with_the_share_of_heads():
    assert products("dense") == 4 * 8 * 64 * 64 * 8
    assert products("sparse") == products("dense") // 2
    assert products("sparse", causal=True) <= products("dense", causal=True) // 2


def test_auto_takes_the_dense_path_where_index_work_is_not_repaid():
    gates = torch.zeros(1, 2048, 8)
    gates[..., :4] = 1
    q = torch.empty(1, 8, 2048, 4).nan_to_num()
    assert pays_to_route(q, q, gates) and pays_to_route(q, q, gates, causal=True)
    assert not pays_to_route(q[:, :, :256], q[:, :, :256], gates[:, :256])
    assert not pays_to_route(q[:, :, :1], q, gates[:, :1]), "decoding"
    assert not pays_to_route(q, q, torch.ones_like(gates))


def test_empty_sizes():
    empty: Any = ({"b": 0}, {"t": 0})
    for shape in empty:
        q, k, v, gates = inputs(**shape)
        assert routed_attention(q, k, v, gates, implementation="sparse").shape == (*gates.shape, 5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gates": torch.ones(2, 11, 7)}, "gates"),
        ({"k": torch.ones(2, 3, 11, 6)}, "n dividing h"),
        ({"implementation": "fast"}, "'fast'"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = dict(zip(("q", "k", "v", "gates"), inputs(), strict=True))
    with pytest.raises(ValueError, match=said):  # unwrapped: without the type checks of the tests, as users have it
        inspect.unwrap(routed_attention)(**{**given, **change})
