"""`attention_with_lse` against the materialised definition, and every guard it puts before the operators."""

import inspect
import subprocess
import sys
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.attend import materialised
from tests.attend.materialised import Case, cases

from headwise.attend import kernels
from headwise.attend.blockwise import attention_blockwise, attention_blockwise_gradients
from headwise.attend.kernels import attention_with_lse, fused_available

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)
IMPLEMENTATIONS = ("auto", "reference")
unchecked = inspect.unwrap(attention_with_lse)  # what users call: without the type checks of the tests


def check(case: Case, dtype: torch.dtype, implementation: Literal["auto", "reference"]) -> None:
    case = case.to(dtype)
    out, lse = attention_with_lse(case.q, case.k, case.v, implementation=implementation, **case.options)
    want, want_lse = materialised.attention(case.q, case.k, case.v, **case.options)
    assert out.dtype == dtype and out.shape == want.shape
    assert lse.dtype == torch.promote_types(dtype, torch.float32) and lse.shape == want_lse.shape
    size = case.v.double().abs().max().clamp(min=1)
    assert (out.double() - want).abs().max() <= TOLERANCE[dtype] * size
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert out[empty].abs().sum() == 0
    error = (lse.double() - want_lse)[~empty].abs() / want_lse[~empty].abs().clamp(min=1)
    assert error.numel() == 0 or error.max() <= (1e-10 if dtype == torch.float64 else 2e-5)


@given(cases(), st.sampled_from([torch.float64, torch.float32]), st.sampled_from(IMPLEMENTATIONS))
def test_equals_definition(case, dtype, implementation):
    check(case, dtype, implementation)


@given(cases(loud=(1.0,)), st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from(IMPLEMENTATIONS))
def test_equals_definition_in_half_precision(case, dtype, implementation):
    check(case, dtype, implementation)


@given(cases(loud=(1.0, 30.0)), st.sampled_from(IMPLEMENTATIONS))
def test_gradient_of_both_outputs_equals_definition(case, implementation):
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    want, want_lse = materialised.attention(*leaves, **case.options)
    seen = want_lse.detach() > -torch.inf
    grad_out, grad_lse = torch.randn_like(want), torch.randn_like(want_lse).masked_fill(~seen, 0)
    loss = (want * grad_out)[seen].sum() + (want_lse * grad_lse)[seen].sum()
    # torch's logsumexp has a NaN gradient on rows of -inf alone, which is what the library must not have.
    expected = [x.nan_to_num(0.0) for x in torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
    out, lse = attention_with_lse(*leaves, implementation=implementation, **case.options)
    got = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    if bool(seen.all()):
        for have, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(have, wanted, rtol=1e-8, atol=1e-9 * max(1.0, float(wanted.abs().max())))
    assert all(x.isfinite().all() for x in got)


def small(dtype=torch.float64, b=2, h=4, n=2, t=5, s=5, d=3, e=3):
    return [torch.randn(b, heads, m, size, dtype=dtype) for heads, m, size in ((h, t, d), (n, s, d), (n, s, e))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["none", "key", "dense", "float_key"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(implementation, kind, softcap):
    q, k, v = (x.requires_grad_() for x in small(e=2))
    mask = materialised.make_mask(kind, 2, 4, 5, 5)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True  # every row sees a key: finite differences know no -inf

    def call(q, k, v):
        return attention_with_lse(q, k, v, mask=mask, causal=True, softcap=softcap, implementation=implementation)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_double_backward():
    q, k, v = (x.requires_grad_() for x in small(b=1, h=2, n=1, t=3, s=3))
    assert torch.autograd.gradgradcheck(lambda *x: attention_with_lse(*x, causal=True), (q, k, v))


def test_double_backward_of_one_input_and_one_output():
    q, k, v = small(b=1, h=2, n=1, t=3, s=3)
    k.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda k: attention_with_lse(q, k, v, causal=True)[1], (k,))


def test_gradient_of_a_mask():
    q, k, v = small()
    bias = torch.randn(1, 4, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: attention_with_lse(q, k, v, mask=m, causal=True), (bias,))


def test_gradient_of_one_output_only():
    leaves = [x.requires_grad_() for x in small()]
    for index in (0, 1):
        fused = torch.autograd.grad(attention_with_lse(*leaves, causal=True)[index].sum(), leaves, allow_unused=True)
        plain = torch.autograd.grad(
            attention_with_lse(*leaves, causal=True, implementation="reference")[index].sum(), leaves, allow_unused=True
        )
        for have, want in zip(fused[: 3 - index], plain[: 3 - index], strict=True):
            torch.testing.assert_close(have, want)


def test_gradient_with_non_finite_gradient_on_empty_rows():
    q, k, v = (x.requires_grad_() for x in small(torch.float32))
    mask = torch.tensor([False, False, True, True, True])[None, None, None]
    out, lse = attention_with_lse(q, k, v, mask=mask, causal=True)
    grads = torch.autograd.grad((out.square().sum() + lse.exp().log().sum()), (q, k, v))  # log 0: inf * 0 on the way
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_of_lse_is_no_worse_than_rounding(dtype):
    exact = [x.requires_grad_() for x in small(torch.float64, t=40, s=40, d=16, e=16)]
    half = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in half]
    weight = 1 + torch.rand(2, 4, 40, dtype=torch.float64)
    for index in (0, 1):
        want = torch.autograd.grad((materialised.attention(*exact, causal=True)[1] * weight).sum(), exact[index])[0]
        got = torch.autograd.grad((attention_with_lse(*half, causal=True)[1] * weight.float()).sum(), half[index])[0]
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_blockwise_gradients_equal_autograd_over_several_blocks(monkeypatch):
    monkeypatch.setattr("headwise.attend.blockwise._BLOCK_ELEMENTS", 2 * 4 * 7 * 3)
    q, k, v = (x.requires_grad_() for x in small(t=8, s=7, e=2))
    mask = torch.rand(2, 1, 8, 7) > 0.5
    options = {"mask": mask, "causal": True, "scale": 0.7, "softcap": 1.3}
    out, lse = attention_blockwise(q, k, v, **options)
    seen = lse.detach() > -torch.inf
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(~seen, 0)
    want = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))
    with torch.no_grad():
        got = attention_blockwise_gradients(grad_out, grad_lse, q, k, v, out, lse, **options)
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["causal", "bool", "grouped", "heads", "batch", "key+causal"])
def test_bit_identical_to_torch(dtype, case):
    q, k, v = small(dtype, b=3, h=8, n=2, t=37, s=37, d=16, e=16)
    mask = torch.rand(3, 1, 37, 37) > 0.3
    if case == "causal":
        got = attention_with_lse(q[:, :2], k, v, causal=True)[0]
        want = F.scaled_dot_product_attention(q[:, :2], k, v, is_causal=True)
    elif case == "bool":
        got = attention_with_lse(q[:, :2], k, v, mask=mask)[0]
        want = F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask)
    elif case == "grouped":
        got = attention_with_lse(q, k, v, causal=True)[0]
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    elif case == "heads":
        got = attention_with_lse(q[:, 4:], k[:, 1:], v[:, 1:], mask=mask)[0]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[:, 4:]
    elif case == "batch":
        got = attention_with_lse(q[1:2], k[1:2], v[1:2], mask=mask[1:2])[0]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[1:2]
    else:
        keys = torch.rand(3, 1, 1, 37) > 0.5
        dense = keys & torch.ones(37, 37, dtype=torch.bool).tril()
        got = attention_with_lse(q, k, v, mask=keys, causal=True)[0]
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    assert torch.equal(got, want)


def test_no_edit_changes_when_gradients_are_wanted():
    q, k, v = small(torch.float32, t=33, s=33)
    with_grad = attention_with_lse(q.clone().requires_grad_(), k, v, causal=True)
    for have, want in zip(with_grad, attention_with_lse(q, k, v, causal=True), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0)])
def test_empty_axes(implementation, shape):
    b, t, s = shape
    q, k, v = (x.requires_grad_() for x in small(b=b, t=t, s=s, e=2))
    out, lse = attention_with_lse(q, k, v, implementation=implementation)
    assert out.shape == (b, 4, t, 2) and lse.shape == (b, 4, t)
    assert not out.any() and bool((lse == -torch.inf).all())
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


def test_lse_of_zero_is_not_an_empty_row():
    q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 1, 8)
    out, lse = attention_with_lse(q, k, torch.zeros(1, 1, 1, 8), mask=torch.tensor([[True], [False]]))
    assert lse.tolist() == [[[0.0, -torch.inf]]] and not out.any()


def test_finfo_min_is_a_bias_not_a_mask():
    q, k, v = small(torch.float32)
    mask = torch.zeros(5, 5)
    mask[2] = torch.finfo(torch.float32).min
    for implementation in IMPLEMENTATIONS:
        out, lse = attention_with_lse(q, k, v, mask=mask, implementation=implementation)
        torch.testing.assert_close(out[:, :, 2], v.mean(2).repeat_interleave(2, 1))
        assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_of_any_float_dtype(dtype, mask_dtype):
    q, k, v = small(dtype, t=40, s=70, d=16, e=16)
    mask = (2 * torch.randn(2, 1, 40, 70)).to(mask_dtype)
    want = materialised.attention(q, k, v, mask=mask)[0]
    got = attention_with_lse(q, k, v, mask=mask)[0]
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * v.abs().max()


def test_strided_inputs():
    q, k, v = (x[..., ::2] for x in small(torch.float32, d=16, e=16))
    want = attention_with_lse(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    for have, wanted in zip(attention_with_lse(q, k, v, causal=True), want, strict=True):
        assert torch.equal(have, wanted)


def test_autocast_is_honoured():
    q, k, v = small(torch.float32, t=9, s=9)
    with torch.autocast("cpu", torch.bfloat16):
        got, lse = attention_with_lse(q, k, v, causal=True)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        reference, _ = attention_with_lse(q, k, v, causal=True, implementation="reference")
    assert got.dtype == reference.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(got, want)


COMPILED = """
import torch
from headwise.attend.kernels import attention_with_lse

q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
dense = torch.rand(2, 1, 6, 6) > 0.5
masks = [None, dense, dense[:, :, :1], torch.zeros(6, 6).masked_fill(dense[0, 0], -torch.inf)]

def check(dynamic, **options):
    torch.compiler.reset()

    def call(q, k, v, mask):
        return attention_with_lse(q, k, v, mask=mask, causal=True, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for mask in masks:
        for have, want in zip(compiled(q, k, v, mask), call(q, k, v, mask), strict=True):
            assert torch.equal(have, want), (options, mask)

with torch.no_grad():
    check(False)
    check(True)
    check(False, implementation="reference")
leaf = q.clone().requires_grad_()
compiled = torch.compile(lambda q: attention_with_lse(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
grads = []
for call in (compiled, lambda q: attention_with_lse(q, k, v, causal=True)):
    out, lse = call(leaf)
    grads.append(torch.autograd.grad(out.sum() + lse.square().sum(), leaf)[0])
assert torch.allclose(*grads)
"""


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    """In a process of its own: the run-time type checks of the tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_operators_the_definition_answers(monkeypatch):
    q, k, v = (x.requires_grad_() for x in small())
    want = attention_with_lse(q, k, v, causal=True)
    want_grad = torch.autograd.grad((want[0].sum(), want[1].sum()), (q, k, v))
    monkeypatch.setattr(kernels, "_CPU_OPERATOR", False)
    assert not fused_available(q, k, v)
    got = attention_with_lse(q, k, v, causal=True)
    grad = torch.autograd.grad((got[0].sum(), got[1].sum()), (q, k, v))
    for have, wanted in zip((*got, *grad), (*want, *want_grad), strict=True):
        torch.testing.assert_close(have, wanted)


def test_fused_available():
    q, k, v = small(torch.float32)
    assert fused_available(q) and fused_available(q, k, v, mask=torch.zeros(5, 5))
    assert not fused_available(q, softcap=30.0)
    assert not fused_available(q[:, :, :0], k, v)
    assert not fused_available(q.to(torch.complex64))
    assert not fused_available(q, mask=torch.zeros(5, 5, requires_grad=True))
    with torch.no_grad():
        assert fused_available(q, mask=torch.zeros(5, 5, requires_grad=True))


def test_reference_memory_is_bounded_by_blocks(monkeypatch):
    monkeypatch.setattr("headwise.attend.blockwise._BLOCK_ELEMENTS", 1)
    largest = 0
    exp = torch.exp

    def watch(x):
        nonlocal largest
        largest = max(largest, x.numel())
        return exp(x)

    monkeypatch.setattr(torch, "exp", watch)
    q, k, v = small(t=9, s=11)
    attention_with_lse(q, k, v, implementation="reference")
    assert largest == 2 * 4 * 1 * 11


def test_inputs_are_left_unchanged():
    q, k, v = small(torch.float32)
    mask = torch.rand(2, 1, 5, 5) > 0.5
    before = [x.clone() for x in (q, k, v, mask)]
    attention_with_lse(q, k, v, mask=mask, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, mask), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, None), r"q has shape \(4, 5, 3\); expected \[batch, heads, tokens, size\]"),
        (lambda q, k, v: (q, k.float(), v, None), r"q is torch.float64 on cpu but k is torch.float32"),
        (lambda q, k, v: (q, k, v[:, :, :4], None), r"do not fit; expected \[b h t d\]"),
        (lambda q, k, v: (q, k[..., :2], v, None), r"do not fit"),
        (lambda q, k, v: (q[:, :3], k, v, None), r"3 query heads over 2 key heads; the key heads must divide"),
        (lambda q, k, v: (q, k, v, torch.ones(5, 4)), r"shape \(5, 4\); it must broadcast to \(2, 4, 5, 5\)"),
        (lambda q, k, v: (q, k, v, torch.ones(5, 5).long()), r"mask is torch.int64; expected booleans"),
    ],
)
def test_refusals(change, message):
    q, k, v, mask = change(*small())
    with pytest.raises(ValueError, match=message):
        unchecked(q, k, v, mask=mask)


def test_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="'fast'; choose 'auto' or 'reference'"):
        unchecked(*small(), implementation="fast")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "key", "dense", "float", "rows"])
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_equals_definition(dtype, kind, causal):
    q, k, v = (x.to(dtype) for x in small(b=2, h=4, n=2, t=37, s=45, d=20, e=12))
    mask = materialised.make_mask(kind, 2, 4, 37, 45)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)  # the operators read a bias in the dtype of q
    want, want_lse = materialised.attention(q, k, v, mask=mask, causal=causal)
    on_gpu = [x.cuda().requires_grad_() for x in (q, k, v)]
    out, lse = attention_with_lse(*on_gpu, mask=None if mask is None else mask.cuda(), causal=causal)
    assert (out.cpu().double() - want).abs().max() <= TOLERANCE[dtype] * v.abs().max()
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-3, atol=1e-3)
    torch.autograd.grad(out.float().sum() + lse.clamp(min=-100).sum(), on_gpu)


@pytest.mark.gpu
def test_cuda_takes_a_bias_in_any_layout():
    q, k, v = (x.float() for x in small(b=2, h=4, n=2, t=13, s=13, d=16, e=16))
    bias = torch.randn(13, 13, 4).permute(2, 0, 1)[None]  # as T5 makes it: the heads lie innermost
    want, want_lse = materialised.attention(q, k, v, mask=bias)
    out, lse = attention_with_lse(q.cuda(), k.cuda(), v.cuda(), mask=bias.cuda())
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-4, atol=1e-4)
