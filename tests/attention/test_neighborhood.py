"""Neighbourhood attention against its definition, against NATTEN's numbers, and against what is known exactly."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.attention.neighborhoods import NO_CPP, by_loops, cases, needs_cpp, neighbours, options, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import sliding_window_causal_mask_function

import headwise as hw
from headwise.attend import Ablate, Sink
from headwise.attention import (
    NeighborhoodAttention,
    neighborhood_attention,
    neighborhood_mask,
    neighborhood_mask_mod,
)
from headwise.attention import _neighborhood_axes as geometry
from headwise.attention._neighborhood_tiles import tiles_forward
from headwise.hf import probe
from headwise.ops import flops

sdpa: Any = torch.nn.functional.scaled_dot_product_attention
FIXTURE = Path(__file__).parents[1] / "fixtures" / "natten.safetensors"
FAST = ["tiled", pytest.param("cpp", marks=needs_cpp)]


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_equals_the_loops(backend):
    q, k, v = tensors((5, 6), heads=4, size=4, e=3)
    bias = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rules = [(3, 1, 1, False), (4, 1, 1, False)]
    ours = neighborhood_attention(q, k, v, (3, 4), bias=bias, backend=backend)
    torch.testing.assert_close(ours, by_loops(q, k, v, rules, bias), atol=1e-12, rtol=1e-12)
    rules = [(2, 2, 2, True), (3, 2, 1, False)]
    ours = neighborhood_attention(q, k, v, (2, 3), stride=2, dilation=(2, 1), is_causal=(True, False), backend=backend)
    torch.testing.assert_close(ours, by_loops(q, k, v, rules), atol=1e-12, rtol=1e-12)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_masks_are_the_counted_windows(axes):
    grid, kernel, given_ = options(axes)
    mask = neighborhood_mask(grid, kernel, given_["stride"], given_["dilation"], given_["is_causal"])
    near = [[neighbours(i, n, *rule) for i in range(n)] for n, *rule in axes]
    expected = torch.zeros_like(mask)
    places = list(itertools.product(*(range(n) for n in grid)))
    for row, place in enumerate(places):
        seen = set(itertools.product(*(near[axis][i] for axis, i in enumerate(place))))
        expected[row] = torch.tensor([other in seen for other in places])
    assert torch.equal(mask, expected)
    if not any(given_["is_causal"]):
        assert bool((mask.sum(-1) == math.prod(kernel)).all())
    index = torch.arange(len(places))
    mod = neighborhood_mask_mod(grid, kernel, given_["stride"], given_["dilation"], given_["is_causal"])
    zero = torch.tensor(0)
    assert torch.equal(mod(zero, zero, index[:, None], index), mask)


@given(cases(), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fast_paths_equal_the_definition(axes, heads, with_bias, with_extra):
    grid, kernel, given_ = options(axes)
    q, k, v = tensors(grid, *heads, size=5, e=6)
    generator = torch.Generator().manual_seed(1)
    bias = (
        torch.randn(heads[0], *(2 * n - 1 for n in kernel), generator=generator, dtype=q.dtype) if with_bias else None
    )
    extra = None
    if with_extra:
        extra = tuple(torch.randn(2, 3, heads[1], n, generator=generator, dtype=q.dtype) for n in (5, 6))
    given_ |= {"return_lse": True, "extra_kv": extra, "bias": bias}
    expected = neighborhood_attention(q, k, v, kernel, backend="reference", **given_)
    for ours, theirs in zip(neighborhood_attention(q, k, v, kernel, backend="tiled", **given_), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    if NO_CPP is None:
        low = [None if x is None else x.float() for x in (q, k, v, bias)]
        given_ |= {"bias": low.pop(), "extra_kv": None if extra is None else tuple(x.float() for x in extra)}
        found = neighborhood_attention(*low, kernel, backend="cpp", **given_)
        scale = expected[0].abs().max()
        assert (found[0] - expected[0]).abs().max() <= 2e-6 * scale
        torch.testing.assert_close(found[1].double(), expected[1], atol=5e-6, rtol=2e-6)


FLEX = """
import torch
from headwise.attention import neighborhood_attention
for grid, kernel, dilation, causal in (((19,), 4, 2, True), ((11, 18), (3, 5), 1, (True, False))):
    q, k, v = (torch.randn(2, *grid, heads, 8) for heads in (4, 2, 2))
    given = {"dilation": dilation, "is_causal": causal, "return_lse": True}
    ours = neighborhood_attention(q, k, v, kernel, backend="flex", **given)
    theirs = neighborhood_attention(q, k, v, kernel, backend="reference", **given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
print("same")
"""


def test_flex_equals_the_definition():
    assert run_alone(FLEX) == "same"


def run_alone(code: str) -> str:
    """In a process of its own: the checks of shapes under pytest do not compile."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# NATTEN


def test_equals_natten():
    with safe_open(FIXTURE, "pt") as file:
        cases_ = json.loads(file.metadata()["cases"])
        names = [name for name in cases_ if not name.startswith("module")]
        assert len(names) == 13
        for name in names:
            q, k, v, out = (file.get_tensor(f"{name}.{key}") for key in ("q", "k", "v", "out"))
            case = cases_[name]
            given_ = {"stride": case["stride"], "dilation": case["dilation"], "is_causal": case["causal"]}
            for backend in ("reference", "tiled", *(["cpp"] if NO_CPP is None else [])):
                ours = neighborhood_attention(q, k, v, case["kernel"], backend=backend, **given_)
                torch.testing.assert_close(
                    ours, out, atol=1e-5, rtol=1e-5, msg=lambda m, n=name, b=backend: f"{n} {b} {m}"
                )


def test_the_layer_loads_nattens_weights():
    with safe_open(FIXTURE, "pt") as file:
        for name, given_ in json.loads(file.metadata()["cases"]).items():
            if not name.startswith("module"):
                continue
            layer = NeighborhoodAttention(16, 2, **given_).eval()
            prefix = f"{name}.weights."
            layer.load_state_dict({k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if prefix in k})  # noqa: SIM118
            x, out = file.get_tensor(f"{name}.x"), file.get_tensor(f"{name}.out")
            torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-5)


# Identities


@pytest.mark.parametrize("backend", FAST)
def test_limits(backend):
    q, k, v = (x.float() for x in tensors((6, 7)))
    heads_first = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]

    def attend(kernel, **given_):
        return neighborhood_attention(q, k, v, kernel, backend=backend, **given_)

    full = sdpa(*heads_first).transpose(1, 2).unflatten(1, (6, 7))
    torch.testing.assert_close(attend((6, 7)), full, atol=2e-6, rtol=1e-5)
    assert torch.equal(attend(1), v) or torch.allclose(attend(1), v, atol=1e-7)
    parts = [x.unflatten(1, (3, 2)).flatten(2, 3).flatten(0, 1).transpose(1, 2) for x in (q, k, v)]
    blocked = sdpa(*parts).transpose(1, 2).unflatten(0, (2, 3)).unflatten(2, (2, 7)).flatten(1, 2)
    torch.testing.assert_close(attend((2, 7), stride=(2, 7)), blocked, atol=2e-6, rtol=1e-5)
    line = [x.flatten(1, 2) for x in (q, k, v)]
    causal = neighborhood_attention(*line, 42, is_causal=True, backend=backend)
    expected = sdpa(*heads_first, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(causal, expected, atol=2e-6, rtol=1e-5)


def test_one_causal_axis_is_the_librarys_sliding_window():
    seen, at = sliding_window_causal_mask_function(5), torch.arange(17)
    expected = seen(torch.tensor(0), torch.tensor(0), at[:, None], at)
    assert torch.equal(neighborhood_mask(17, 5, is_causal=True), expected)


@pytest.mark.parametrize("backend", FAST)
def test_dilation_is_so_many_neighbourhoods(backend):
    q, k, v = (x.float() for x in tensors((23,)))
    whole = neighborhood_attention(q, k, v, 4, dilation=5, backend=backend)
    for group in range(5):  # of 5, 5, 5, 4 and 4 tokens
        part = neighborhood_attention(*(x[:, group::5] for x in (q, k, v)), 4, backend=backend)
        torch.testing.assert_close(whole[:, group::5], part, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_moves_with_its_input_away_from_borders(backend):
    q, k, v = (x.float() for x in tensors((30, 25)))
    given_ = {"bias": torch.randn(2, 9, 9), "backend": backend}
    ours = neighborhood_attention(q, k, v, 5, **given_)
    moved = neighborhood_attention(*(x.roll((1, 2), (1, 2)) for x in (q, k, v)), 5, **given_)
    torch.testing.assert_close(moved[:, 6:-5, 7:-5], ours[:, 5:-6, 5:-7], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_constant_values_come_out_constant(backend):
    q, k, _ = (x.float() * 5 for x in tensors((9, 21)))
    out = neighborhood_attention(q, k, torch.full_like(q, 0.75), (4, 6), dilation=(2, 1), backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 0.75))


@pytest.mark.parametrize("backend", FAST)
def test_scores_of_any_size_and_what_is_not_a_number(backend):
    q, k, v = (x.float() for x in tensors((40,)))
    ours = neighborhood_attention(100 * q, 100 * k, v, 7, backend=backend)
    reference = neighborhood_attention(100 * q.double(), 100 * k.double(), v.double(), 7, backend="reference")
    torch.testing.assert_close(ours.double(), reference, atol=5e-4, rtol=1e-3)
    k[0, 20] = torch.nan
    out = neighborhood_attention(q, k, v, 7, backend=backend)
    assert bool(out[0, 17:24].isnan().any(-1).all()), "every row that sees it"
    assert bool(out[1].isfinite().all())


# Gradients


@pytest.mark.parametrize(
    "case",
    [
        ((7,), 3, 1, 2, True),
        ((4, 5), (3, 2), 1, 1, False),
        ((2, 3, 4), 2, (1, 2, 1), 1, (True, False, False)),
    ],
)
def test_gradients_are_right(case):
    grid, kernel, stride, dilation, causal = case
    q, k, v = tensors(grid, heads=2, kv=1, size=3, e=2, requires_grad=True)
    q, k, v = (x[:1].detach().requires_grad_() for x in (q, k, v))
    widths = [2 * n - 1 for n in ([kernel] * len(grid) if isinstance(kernel, int) else kernel)]
    bias = torch.randn(2, *widths, dtype=q.dtype, requires_grad=True)
    extra = [torch.randn(1, 2, 1, n, dtype=q.dtype, requires_grad=True) for n in (3, 2)]

    def attend(q, k, v, bias, ek, ev):
        return neighborhood_attention(
            q, k, v, kernel, stride=stride, dilation=dilation, is_causal=causal, bias=bias, extra_kv=(ek, ev),
            return_lse=True, backend="tiled",
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, *extra))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_equal_those_of_the_definition(backend, with_bias):
    found = {}
    for one in (backend, "reference"):
        q, k, v = (x.float().requires_grad_() for x in tensors((19, 22), 4, 2))
        bias = torch.linspace(-1, 1, 4 * 9 * 11).view(4, 9, 11).requires_grad_() if with_bias else None
        out, lse = neighborhood_attention(
            q, k, v, (5, 6), bias=bias, is_causal=(False, True), return_lse=True, backend=one
        )
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.square().sum()
        found[one] = torch.autograd.grad(loss, [x for x in (q, k, v, bias) if x is not None])
    for ours, theirs in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=1e-4)


def test_masks_made_while_inferring_do_not_break_training():
    geometry.plan_of.cache_clear()
    q, k, v = (x.float() for x in tensors((13, 17)))
    with torch.inference_mode():
        inferred = neighborhood_attention(q, k, v, (3, 5), bias=torch.zeros(2, 5, 9), backend="tiled")
    q.requires_grad_()
    out = neighborhood_attention(q, k, v, (3, 5), bias=torch.zeros(2, 5, 9), backend="tiled")
    assert torch.equal(out, inferred)
    out.sum().backward()
    plan = geometry.plan_of((geometry.Axis(13, 3), geometry.Axis(17, 5)))
    kept = [x for x in plan._kept.values() if x is not None]
    assert kept and not any(x.is_inference() for x in kept)


# The tiles


def test_nothing_of_the_size_of_all_pairs_is_made():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor) and not one._is_view():
                    largest = max(largest, one.numel())
            return out

    q, k, v = (torch.randn(1, 2, 64, 64, 8) for _ in range(3))
    with Watch():
        tiles_forward(q, k, v, None, [geometry.Axis(64, 7), geometry.Axis(64, 7)], 1.0)
    assert largest == q.numel(), "the output is the largest; weights alone would be 49 / 8 of it"


def test_interior_tiles_share_one_mask():
    plan = geometry.plan_of((geometry.Axis(112, 7), geometry.Axis(112, 7)))
    assert len(plan.tiles) == 256 and {len(one) for one in plan.patterns} == {3}
    covered = torch.zeros(112, 112, dtype=torch.long)
    for tile in plan.tiles:
        (a, b), (c, d) = tile.queries
        covered[a:b, c:d] += 1
    assert bool((covered == 1).all())


def test_operations_are_counted():
    q, k, v = (x.float() for x in tensors((20, 30), heads=4, kv=4, size=8))
    fn = lambda q, k, v: neighborhood_attention(q, k, v, (5, 7), backend="tiled")  # noqa: E731
    assert flops(fn, (q, k, v)) == 4 * 2 * 600 * 35 * 4 * 8


COMPILED = """
import torch
from headwise.attention import NeighborhoodAttention
layer = NeighborhoodAttention(16, 2, (3, 5), dilation=(1, 2), relative_bias=True).eval()
x = torch.randn(2, 6, 11, 16)
compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), layer(x))
compiled(x).sum().backward()
print(float(layer.rpb.grad.abs().max()) > 0)
"""


def test_compiles_without_breaks():
    assert run_alone(COMPILED) == "True"


# The layer


@pytest.mark.parametrize("grid", [(12,), (5, 6), (3, 4, 5)])
def test_the_layer_on_grids_of_any_rank(grid):
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 4, 3, num_kv_heads=2).eval()
    x = torch.randn(2, *grid, 16)
    flat = NeighborhoodAttention(16, 4, 3, num_kv_heads=2, grid_size=grid).eval()
    flat.load_state_dict(layer.state_dict())
    torch.testing.assert_close(flat(x.flatten(1, -2)), layer(x).flatten(1, -2))
    causal = NeighborhoodAttention(16, 4, 3, num_kv_heads=2, is_causal=True)
    other = x.clone()
    other[:, 2:] = 0
    torch.testing.assert_close(causal(other)[:, :2], causal(x)[:, :2])
    assert layer(x[:0]).shape == (0, *grid, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - layer(x.clone()).float()).norm() == 0
        low = layer(x)
    assert low.dtype == torch.bfloat16 and (low.float() - layer(x)).norm() < 0.03 * layer(x).norm()


def test_kernel_one_is_a_linear_projection():
    layer = NeighborhoodAttention(16, 2, 1).eval()
    x = torch.randn(2, 4, 5, 16)
    expected = layer.proj(layer.qkv(x)[..., 32:])
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_weights_of_its_heads_are_read_and_changed():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 2, (3, 3), dilation=(1, 2), relative_bias=True).eval()
    assert layer.rpb is not None
    torch.nn.init.normal_(layer.rpb)
    x, sink = torch.randn(1, 5, 7, 16), Sink()
    with probe(layer, sink):
        plain = layer(x)
    q, k, _ = layer.qkv(x).view(1, 35, 3, 2, 8).permute(2, 0, 3, 1, 4)
    mask = neighborhood_mask((5, 7), 3, 1, (1, 2))
    bias = torch.zeros(2, 35, 35)
    for i, j in itertools.product(range(35), range(35)):
        if mask[i, j]:
            bias[:, i, j] = layer.rpb[:, j // 7 - i // 7 + 2, (j % 7 - i % 7) // 2 + 2]
    weights = (q @ k.mT * 8**-0.5 + bias).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(sink.scores()["", 0].float(), weights[0, :, 1:, 0].mean(-1), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), hw.steer(layer, Ablate(mode="uniform")):
        even = layer(x)
    value = layer.qkv(x)[..., 32:].flatten(1, 2)
    expected = layer.proj((mask.float() / mask.sum(-1, keepdim=True)) @ value)
    torch.testing.assert_close(even.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer(x), plain)


def test_windows_that_do_not_fit_may_be_clipped():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(16, 2, (7, 7), dilation=(1, 2), relative_bias=True, clip_window=True).eval()
    assert layer.rpb is not None
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, 5, 9, 16)
    smaller = NeighborhoodAttention(16, 2, (5, 4), dilation=(1, 2), relative_bias=True).eval()
    state = layer.state_dict()
    smaller.load_state_dict({**state, "rpb": state["rpb"][:, 2:11, 3:10]})  # offsets of at most 4 and 3
    torch.testing.assert_close(layer(x), smaller(x))


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": (3, 8)}, "axis 1: kernel_size 8 times dilation 1 is 8, more than its length 7"),
        ({"kernel_size": 3, "dilation": (3, 1)}, "axis 0: kernel_size 3 times dilation 3 is 9, more than its length 6"),
        ({"kernel_size": 2, "dilation": 7, "clip_window": True}, "axis 0: dilation 7 exceeds its length 6"),
        ({"kernel_size": 3, "stride": (1, 4)}, "axis 1: stride 4 exceeds kernel_size 3"),
        ({"kernel_size": (3, 0)}, "kernel_size of axis 1 is 0; expected an integer from 1 on"),
        ({"kernel_size": 3, "dilation": -1}, "dilation of axis 0 is -1"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size has 3 values for a grid of 2 axes"),
        ({"kernel_size": 3, "is_causal": (True,)}, "is_causal has 1 values for a grid of 2 axes"),
        ({"kernel_size": 3, "bias": torch.zeros(2, 5, 4)}, r"bias has shape \(2, 5, 4\); expected \(2, 5, 5\)"),
        ({"kernel_size": 3, "layout": "channels"}, "layout is 'channels'"),
        ({"kernel_size": 3, "backend": "triton"}, "backend is 'triton'"),
        ({"kernel_size": 3, "backend": "flex", "bias": torch.zeros(2, 5, 5)}, "'flex' takes no bias"),
        (
            {"kernel_size": 3, "extra_kv": (torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))},
            r"extra keys have shape \(2, 1, 3, 8\); expected \[batch, extras, heads, size\] with batch 2, 2 heads",
        ),
        (
            {"kernel_size": 3, "extra_kv": (torch.zeros(2, 1, 2, 8), torch.zeros(2, 4, 2, 8))},
            "differ in number",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = (x.float() for x in tensors((6, 7)))
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, k, v, **change)


def test_tensors_that_do_not_fit_are_refused():
    q, k, v = (x.float() for x in tensors((6, 7)))
    for change, error, message in [
        ((q[0, 0], k[0, 0], v[0, 0]), ValueError, "expected batch, one to three axes of positions"),
        ((q, k[:, :5], v), ValueError, "axis 0 has 6 queries, 5 keys and 6 values"),
        ((q, k, v[:, :, :5]), ValueError, "axis 1 has 7 queries, 7 keys and 5 values"),
        ((q.repeat(1, 1, 1, 2, 1)[:, :, :, :3], k, v), ValueError, "3 query heads, 2 key heads, 2 value heads"),
        ((q.long(), k, v), TypeError, "q is torch.int64"),
        ((q, k.double(), v), ValueError, "q is torch.float32 on cpu but k is torch.float64"),
        ((q, k[..., :4], v), ValueError, "the sizes of q and k"),
    ]:
        with pytest.raises(error, match=message):
            neighborhood_attention(*change, 3)
    with pytest.raises(RuntimeError, match="cannot be used"):
        neighborhood_attention(*(x.double() for x in (q, k, v)), 3, backend="cpp")
    with pytest.raises(ValueError, match="10 tokens, and grid_size"):
        NeighborhoodAttention(16, 2, 3, grid_size=(3, 4))(torch.zeros(1, 10, 16))
    with pytest.raises(ValueError, match="give kernel_size a value for every axis"):
        NeighborhoodAttention(16, 2, 3, relative_bias=True)
