"""Sparsifiner's attention: the choice by a naive reading of its definition, limits, costs, refusals."""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import mechanisms
from torch.utils.flop_counter import FlopCounterMode

import headwise as hw
from headwise.attend.edits import ScaleHeads
from headwise.attend.probes import Entropy
from headwise.attention import _sparsifiner_cpp as cpp
from headwise.attention.softmax import SoftmaxAttention
from headwise.attention.sparsifiner import (
    ConnectivityPredictor,
    SparsifinerAttention,
    attention_products,
    connectivity_from_indices,
    gathered_attention,
    predictor_loss,
)
from headwise.ops.counting import _FORMULAS

NO_CPP = cpp.KERNEL.unavailable()
needs_cpp = pytest.mark.skipif(NO_CPP is not None, reason=f"the C++ kernel: {NO_CPP}")


def layer(keep=0.25, tokens=26, reduction=3, **options) -> SparsifinerAttention:
    made = SparsifinerAttention(32, 4, tokens, keep=keep, token_reduction=reduction, coef_topk=5, **options).eval()
    for weight in (made.mask_predictor.proj_n, made.mask_predictor.proj_back_n):  # a basis that was trained
        torch.nn.init.normal_(weight, std=0.3)
    return made


def queries(tokens=26, b=2):
    return torch.randn(b, 4, tokens, 8), torch.randn(b, 4, tokens, 8)


@torch.no_grad()
def by_loops(p: ConnectivityPredictor, q, k):
    """Kept keys of each patch query, from the definition, one query at a time in float64."""
    wq, wk = p.proj_c_q, p.proj_c_k
    basis = p.proj_back_n.detach().double().abs()
    basis = torch.where(basis > p.basis_threshold, basis, 0.0)
    found = []
    for item in range(len(q)):
        for head in range(q.shape[1]):
            kk = k[item, head].double() @ wk.weight.double().T + wk.bias.double()
            down = kk.T @ p.proj_n.double()
            for t in range(p.prefix, q.shape[2]):
                qq = wq.weight.double() @ q[item, head, t].double() + wq.bias.double()
                s = torch.softmax(qq @ down / math.sqrt(p.num_heads), -1)
                order = sorted(range(len(s)), key=lambda i: -float(s[i]))[: p.coef_topk]
                a = torch.stack([s[i] * basis[:, i] for i in order]).sum(0)
                found.append(sorted(range(len(a)), key=lambda j: (-float(a[j]), j))[: p.budget])
    return torch.tensor(found).view(*q.shape[:2], q.shape[2] - p.prefix, -1)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_choice_is_the_definition(prefix):
    p = layer(num_prefix_tokens=prefix).mask_predictor
    q, k = queries()
    found = p(q, k)
    assert found.shape == (2, 4, 26 - prefix, 7)
    assert torch.equal(found.sort(-1).values, by_loops(p, q, k).sort(-1).values)


def test_ties_are_broken_by_the_lower_key():
    """A fresh basis is mostly below the threshold, and a basis of zeros entirely: the first keys are kept."""
    p = layer().mask_predictor
    torch.nn.init.zeros_(p.proj_back_n)
    assert torch.equal(p(*queries()), torch.arange(7).expand(2, 4, 25, 7))
    fresh = ConnectivityPredictor(8, 197, 4)
    assert fresh.density() < 0.4


def test_learning_is_signed_and_use_is_not():
    p, (q, k) = layer().mask_predictor, queries()
    flipped = copy.deepcopy(p)
    with torch.no_grad():
        flipped.proj_back_n.neg_()
    torch.testing.assert_close(flipped.reconstruct(q, k), -p.reconstruct(q, k))
    assert torch.equal(flipped(q, k), p(q, k))


def test_coefficients_are_weights_of_basis_vectors_scaled_by_heads():
    p, (q, k) = layer().mask_predictor, queries()
    found = p.coefficients(q, k)
    assert found.shape == (2, 4, 25, 8)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 25))
    alone = copy.deepcopy(p)
    alone.num_heads = 16
    logits = p.proj_c_q(q)[:, :, 1:] @ (p.proj_c_k(k).mT @ p.proj_n)
    torch.testing.assert_close(alone.coefficients(q, k), (logits / 4).softmax(-1))


def test_every_query_keeps_its_budget_and_the_class_token_all():
    p, (q, k) = layer().mask_predictor, queries()
    mask = connectivity_from_indices(p(q, k), 26)
    assert torch.equal(mask[:, :, 0].sum(-1), torch.full((2, 4), 26))
    assert torch.equal(mask[:, :, 1:].sum(-1), torch.full((2, 4, 25), 7))
    assert (mask[:, :, 1:, 0].float().mean() < 1) or p.budget == 26, "the class token's column is not forced"


@pytest.mark.parametrize("keep", [0.04, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("std", [0.02, 0.3, 0.0])  # nearly all scores 0, hardly any, all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_has_the_keys_that_sorting_finds(keep, std, dtype):
    p, (q, k) = layer(keep=keep).mask_predictor.to(dtype), (x.to(dtype) for x in queries())
    with torch.no_grad():
        p.proj_back_n.normal_(std=std)
    assert torch.equal(p.mask(q, k), connectivity_from_indices(p(q, k), 26))
    few = torch.tensor([[0, 3, 4, 7, 11, 25], [0, 1, 2, 3, 20, 21]])
    short = (q[:, :, :6], k[:, :, :6])
    assert torch.equal(p.mask(*short, few), connectivity_from_indices(p(*short, few), 6))
    assert p.mask(q[:0], k[:0]).shape == (0, 4, 26, 26)


@given(st.integers(2, 90), st.floats(0.01, 1), st.sampled_from([0.0, 0.02, 0.3]), st.integers(1, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sums_of_a_few_vectors_and_thresholds_find_what_a_product_and_a_sort_do(tokens, keep, std, topk, pruned):
    """In float64, with ties (none but 0, which both sums give exactly), and with pruned tokens too."""
    torch.manual_seed(tokens)
    topk = min(topk, tokens // 2)
    p = ConnectivityPredictor(8, tokens, 4, keep=keep, token_reduction=2, coef_topk=topk, num_prefix_tokens=0).double()
    torch.nn.init.normal_(p.proj_n, std=0.3)
    torch.nn.init.normal_(p.proj_back_n, std=std)
    n = 1 + tokens // 2 if pruned else tokens
    positions = torch.arange(n).expand(2, n) if pruned else None
    q, k = (torch.randn(2, 4, n, 8, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        s = p.coefficients(q, k, positions)
        kept, places = s.topk(topk)
        rough = torch.zeros_like(s).scatter(-1, places, kept) @ p.sparse_basis()[:n].mT
        order = rough.sort(dim=-1, descending=True, stable=True).indices[..., : min(p.budget, n)]
    assert torch.equal(p.mask(q, k, positions), connectivity_from_indices(order, n, 0))
    for ours, theirs in zip(p._scores(q, k, positions), rough.split(64, 2), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-13)


def test_choices_depend_on_the_image_and_the_head():
    p, (q, k) = layer().mask_predictor, queries()
    found = p(q, k).sort(-1).values
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[:, 0], found[:, 1])


def test_keep_one_is_dense_attention_with_its_gradients():
    made, dense = layer(keep=1.0), SoftmaxAttention(32, 4)
    made.load_dense(dense)
    x = torch.randn(2, 26, 32).requires_grad_()
    for one in (made, dense):
        one.zero_grad()
    outs = [one(x) for one in (made, dense)]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-5)
    made.mode = "dense"
    torch.testing.assert_close(made(x), outs[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1])
def test_gathered_masked_and_explicit_are_one_attention(prefix):
    made, x = layer(num_prefix_tokens=prefix), torch.randn(2, 26, 32)
    masked = made(x)
    made.implementation = "gather"
    torch.testing.assert_close(made(x), masked, atol=1e-6, rtol=1e-5)
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in made.qkv(x).chunk(3, -1))
    scores = (q @ k.mT * 8**-0.5).masked_fill(
        ~connectivity_from_indices(made.mask_predictor(q, k), 26, prefix), -torch.inf
    )
    wanted = made.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(masked, wanted, atol=1e-6, rtol=1e-5)


# --- the C++ kernel ---


@given(
    st.integers(2, 200),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.02, 0.3]),  # all scores equal, many 0, hardly any
    st.integers(1, 8),
    st.sampled_from([(8, 4), (40, 1), (64, 6)]),
    st.integers(0, 1),
)
@settings(max_examples=80, deadline=None)
@needs_cpp
def test_the_kernel_keeps_the_keys_that_the_mask_keeps_and_attends_to_them(tokens, keep, std, topk, sizes, prefix):
    """The very same keys, also where scores or coefficients tie; q, k, v are views, as in a layer."""
    torch.manual_seed(tokens)
    size, heads = sizes
    topk = min(topk, tokens // 2)
    p = ConnectivityPredictor(
        size, tokens, heads, keep=keep, token_reduction=2, coef_topk=topk, num_prefix_tokens=prefix
    )
    torch.nn.init.normal_(p.proj_n, std=std)
    torch.nn.init.normal_(p.proj_back_n, std=std)
    q, k, v = torch.randn(2, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    with torch.no_grad():
        mask = p.mask(q, k)
        table = p.sparse_basis().mT.contiguous()
        kept = [cpp.choose(s, table, topk, p.budget) for s in p._in_turn(q, k)]
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        found = p.attend_compiled(q, k, v, 0.3)
    if kept:
        indices = torch.cat(kept, 2).long()
        assert torch.equal(indices, indices.sort(-1).values)
        assert torch.equal(connectivity_from_indices(indices, tokens, prefix), mask)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_cpp
def test_the_kernel_on_several_blocks_of_queries_and_tiles_of_keys():
    """600 tokens: more than a block of coefficients, of queries and of keys; against float64, and in any threads."""
    torch.manual_seed(0)
    p = ConnectivityPredictor(24, 600, 3)
    torch.nn.init.normal_(p.proj_back_n, std=0.1)
    q, k, v = (torch.randn(1, 3, 600, 24) * 2 for _ in range(3))
    mask = p.mask(q, k)
    scores = (q.double() @ k.double().mT * 0.2).masked_fill(~mask, -torch.inf)
    one = p.attend_compiled(q, k, v, 0.2)
    torch.testing.assert_close(one.double(), scores.softmax(-1) @ v.double(), atol=1e-5, rtol=1e-5)
    given_ = (q[:, :, 1:], k, v, p.coefficients(q, k).detach(), p.sparse_basis().mT, p.coef_topk, p.budget, 0.2)
    whole, before = cpp.attention(*given_), torch.get_num_threads()
    torch.testing.assert_close(whole, one[:, :, 1:], atol=1e-6, rtol=1e-5)
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpp.attention(*given_), whole)
    finally:
        torch.set_num_threads(before)


@needs_cpp
def test_the_kernels_largest_of_anything():
    """Infinities, NaN of both signs and negative zeros may be given: exactly `width` places in range come out."""
    odd = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf, 1e-45, 3.0])
    for n in (1, 15, 16, 17, 140, 300):
        basis = odd[torch.randint(7, (9, n), generator=torch.Generator().manual_seed(n))]
        for width in {1, n // 2 + 1, n}:
            found = cpp.choose(odd[torch.randint(7, (1, 1, 6, 9))], basis, 4, width)
            assert found.shape == (1, 1, 6, width)
            assert bool((found >= 0).all() and (found < n).all() and (found.diff(dim=-1) > 0).all())


@needs_cpp
def test_the_kernel_hands_on_what_is_not_a_number():
    p = layer().mask_predictor
    q, k = queries()
    v = torch.randn(2, 4, 26, 8)
    plain = p.attend_compiled(q, k, v, 0.3)
    broken = q.clone()
    broken[0, 1, 7] = torch.nan
    found = p.attend_compiled(broken, k, v, 0.3)
    assert bool(found[0, 1, 7].isnan().all())
    others = torch.ones(2, 4, 26, dtype=torch.bool)
    others[0, 1, 7] = False
    assert torch.equal(found[others], plain[others])


@needs_cpp
def test_the_layer_takes_the_kernel_where_it_can(monkeypatch):
    calls = []
    run = ConnectivityPredictor.attend_compiled
    monkeypatch.setattr(ConnectivityPredictor, "attend_compiled", lambda *args: calls.append(1) or run(*args))
    made, x = layer(), torch.randn(2, 26, 32)
    with torch.no_grad():
        found = made(x)
    assert calls == [1]
    torch.testing.assert_close(made(x), found, atol=1e-6, rtol=1e-5)  # with a gradient: the mask
    with torch.no_grad(), hw.probe(made, Entropy()):
        torch.testing.assert_close(made(x), found, atol=1e-6, rtol=1e-5)
    assert calls == [1]
    made.implementation = "cpp"
    for change, reason in (("a gradient", "it has no gradient"), ("double", "it is for float32 on the CPU")):
        with torch.set_grad_enabled(change == "a gradient"), pytest.raises(RuntimeError, match=reason):
            made.to(torch.float64 if change == "double" else torch.float32)(x.to(made.qkv.weight.dtype))


@needs_cpp
def test_what_the_kernel_cannot_take_is_refused():
    good: Any = {"q": torch.randn(1, 2, 3, 4), "k": torch.randn(1, 2, 9, 4), "v": torch.randn(1, 2, 9, 5)}
    good |= {"coefficients": torch.rand(1, 2, 3, 6), "basis": torch.rand(6, 9), "few": 2, "width": 3, "scale": 1.0}
    assert cpp.attention(**good).shape == (1, 2, 3, 5)
    for change in (
        {"few": 7}, {"few": 0}, {"width": 10}, {"width": 0}, {"basis": torch.rand(5, 9)}, {"basis": torch.rand(6, 8)},
        {"k": torch.randn(1, 2, 8, 4)}, {"v": torch.randn(1, 1, 9, 5)}, {"q": torch.randn(1, 2, 4, 4)},
        {"v": torch.randn(1, 2, 9, 5).double()}, {"coefficients": torch.rand(1, 2, 3, 6).double()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"sparsifiner: .*(basis vectors|kernel takes float32)"):
            cpp._attention(**good | change)  # below the checks of shapes that only tests have


def test_gathered_gradients_are_those_of_the_mask():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    indices = torch.rand(1, 2, 8, 9).argsort(-1)[..., :3]
    mask = connectivity_from_indices(indices, 9)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    found = gathered_attention(q, k, v, indices)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    pairs = [torch.autograd.grad((out * upstream).sum(), (q, k, v)) for out in (found, wanted)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_positions_of_pruned_tokens_choose_their_rows():
    """Gone tokens: the same choice as zeroed keys and scores of -inf in the official form."""
    p, (q, k) = layer().mask_predictor, queries(b=1)
    stay = torch.tensor([[0, 2, 3, 5, 8, 13, 20, 21, 22, 25]])
    found = p(q[:, :, stay[0]], k[:, :, stay[0]], stay)
    gone = torch.ones(26, dtype=torch.bool)
    gone[stay[0]] = False
    keys = (p.proj_c_k(k).masked_fill(gone[:, None], 0)).mT @ p.proj_n
    s = (p.proj_c_q(q)[:, :, 1:] @ keys * 0.5).softmax(-1)
    kept = s.topk(5)
    s = torch.zeros_like(s).scatter(-1, kept.indices, kept.values)
    a = (s @ p.sparse_basis().mT).masked_fill(gone, -torch.inf)
    wanted = a.topk(7).indices.sort(-1).values[:, :, stay[0, 1:] - 1]
    assert torch.equal(stay[0][found].sort(-1).values, wanted)


def test_predicting_trains_the_predictor_alone():
    made, x = layer().train(), torch.randn(2, 26, 32)
    with pytest.raises(ValueError, match="1 layers"):
        predictor_loss(made)
    made.mode = "predict"
    dense = SoftmaxAttention(32, 4)
    dense.load_state_dict({k: v for k, v in made.state_dict().items() if "mask_predictor" not in k})
    torch.testing.assert_close(made(x), dense(x), atol=1e-6, rtol=1e-6)
    loss = predictor_loss(made)
    q, k, _ = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in made.qkv(x).chunk(3, -1))
    rows = (q @ k.mT * 8**-0.5).softmax(-1)[:, :, 1:]
    torch.testing.assert_close(loss, (made.mask_predictor.reconstruct(q, k) - rows).square().sum())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.mask_predictor.parameters())
    assert made.qkv.weight.grad is None
    made.zero_grad()
    made.mode = "sparse"
    copy.deepcopy(made)
    made(x).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in made.mask_predictor.parameters()), "and not in use"


@pytest.mark.parametrize("check", mechanisms.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check):
    """What every mechanism must pass, but for a gradient of the predictor, which has none."""
    made = layer(tokens=13, reduction=2)
    if check is mechanisms.gradients_are_finite_everywhere:
        made.mask_predictor.requires_grad_(False)
        made(torch.randn(3, 13, 32)).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters() if p.requires_grad)
        return
    if check is mechanisms.shape_and_dtype_are_kept:
        assert made(torch.randn(3, 13, 32)).shape == (3, 13, 32) and made(torch.randn(0, 13, 32)).shape == (0, 13, 32)
        return
    if check is mechanisms.bfloat16_is_near:  # which of two nearly equal keys is kept is another matter
        made = layer(tokens=13, reduction=2, keep=1.0)
    check(made, torch.randn(3, 13, 32))


def test_heads_are_read_and_edited():
    made, x = layer(), torch.randn(2, 26, 32)
    made.implementation = "gather"
    plain = made(x)
    with hw.probe(made, Entropy()):
        torch.testing.assert_close(made(x), plain, atol=1e-6, rtol=1e-5)
    with hw.steer(made, ScaleHeads(0.0, heads="all")):
        torch.testing.assert_close(made(x), made.proj.bias.expand(2, 26, 32))
    assert torch.equal(made(x), plain)


# --- costs ---


def test_the_closed_formula_gives_the_published_saving():
    full, empty = (attention_products(197, 384, 6, density=share) for share in (1.0, 0.0))
    assert full.dense == pytest.approx(29.81e6, rel=1e-3)
    assert empty.predictor + empty.sparse == pytest.approx(15.0e6, rel=5e-3)
    assert full.predictor + full.sparse == pytest.approx(16.8e6, rel=5e-3)
    assert full.sparse == pytest.approx(7.68e6, rel=5e-3)
    assert full.saved < 0.48 < empty.saved


def test_counted_products_are_the_formula():
    q, k, v = (torch.randn(1, 4, 26, 8) for _ in range(3))
    indices = torch.rand(1, 4, 25, 26).argsort(-1)[..., :7]
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        gathered_attention(q, k, v, indices)
    wanted = 2 * attention_products(26, 32, 4, token_reduction=3, coef_topk=5).sparse
    assert counter.get_total_flops() == wanted
    if NO_CPP is None:
        p = layer().mask_predictor
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            p.attend_compiled(q, k, v, 1.0)
        assert counter.get_flop_counts()["Global"][torch.ops.headwise.sparsifiner_attention] == 2 * 2 * 32 * 25 * 7


# --- sizes ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.0}, "keep 0.0"),
        ({"keep": 1.5}, "keep 1.5"),
        ({"token_reduction": 40}, "token_reduction 40"),
        ({"channel_reduction": 9}, "channel_reduction 9"),
        ({"coef_topk": 9, "token_reduction": 3}, "there are 8 basis vectors"),
        ({"num_prefix_tokens": 2, "coef_topk": 2}, "num_prefix_tokens 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ConnectivityPredictor(8, 26, 4, **options)


def test_another_number_of_tokens_is_refused_until_resized():
    made = layer()
    with pytest.raises(ValueError, match=r"30 tokens, its weights are for 26; resize_tokens"):
        made(torch.randn(1, 30, 32))
    made.mask_predictor.resize_tokens(30)
    assert made(torch.randn(1, 30, 32)).shape == (1, 30, 32)
    shared = ConnectivityPredictor(8, 26, 4, token_reduction=3, coef_topk=5, share_basis=True)
    shared.resize_tokens(30)
    assert shared.proj_back_n is shared.proj_n and len(shared.proj_n) == 30
    assert torch.equal(shared.proj_n[0], shared.proj_back_n[0])
    with pytest.raises(ValueError, match="1 tokens"):
        shared.resize_tokens(1)


def test_grouped_keys_are_refused():
    with pytest.raises(ValueError, match="grouped"):
        layer().load_dense(SoftmaxAttention(32, 4, num_kv_heads=2))
    assert "indices" in inspect.signature(gathered_attention).parameters
