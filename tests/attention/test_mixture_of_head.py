"""Mixture of heads: gates from the equations by loops, limits in which they are known, losses, refusals."""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import headwise as hw
from headwise.attend.edits import Ablate, ScaleHeads
from headwise.attend.probes import Contribution, HeadOutputs
from headwise.attention.mixture_of_head import (
    HeadGates,
    LearnedRouter,
    MixtureOfHeads,
    QueryNormRouter,
    head_split,
    load_balance,
    moh_gates,
    moh_loss,
    norm_router,
)
from headwise.attention.softmax import SoftmaxAttention


def by_loops(x, w_routed, w_shared, w_balance, k):
    """The equations, a token at a time, in plain numbers."""

    def softmax(weight, token):
        logits = [math.fsum(w * c for w, c in zip(row, token, strict=True)) for row in weight.tolist()]
        top = max(logits)
        powers = [math.exp(z - top) for z in logits]
        return [p / math.fsum(powers) for p in powers]

    out = []
    for token in x.reshape(-1, x.shape[-1]).tolist():
        p = softmax(w_routed, token)
        keep = sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]
        total = math.fsum(p[i] for i in keep)
        routed = [k * p[i] / total if i in keep else 0.0 for i in range(len(p))]
        if w_balance is None:
            out.append(routed)
            continue
        shared = [1.0] if w_shared is None else [len(w_shared) * value for value in softmax(w_shared, token)]
        a = [2 * value for value in softmax(w_balance, token)]
        out.append([a[0] * s for s in shared] + [a[1] * r for r in routed])
    return torch.tensor(out, dtype=torch.float64).view(*x.shape[:2], -1)


@pytest.mark.parametrize(("shared", "routed", "k"), [(3, 5, 2), (1, 4, 4), (0, 6, 1)])
def test_gates_are_the_equations(shared, routed, k):
    x, w_r = torch.randn(2, 7, 5).double(), torch.randn(routed, 5).double()
    w_s = torch.randn(shared, 5).double() if shared > 1 else None
    w_h = torch.randn(2, 5).double() if shared else None
    found = moh_gates(x, w_r, w_s, w_h, k)
    torch.testing.assert_close(found.gates, by_loops(x, w_r, w_s, w_h, k))
    assert torch.equal(found.chosen.sum(-1), torch.full((2, 7), k))
    assert torch.equal(found.gates[..., shared:] != 0, found.chosen)


def test_gates_sum_to_the_heads_in_use():
    x, w_r, w_s, w_h = (torch.randn(*shape).double() for shape in ((2, 7, 5), (5, 5), (3, 5), (2, 5)))
    found = moh_gates(x, w_r, w_s, w_h, 2)
    a = 2 * (x @ w_h.T).softmax(-1)
    torch.testing.assert_close(found.gates.sum(-1), a[..., 0] * 3 + a[..., 1] * 2)
    still = moh_gates(x, w_r, w_s, torch.zeros(2, 5).double(), 2).gates
    torch.testing.assert_close(still.sum(-1), torch.full((2, 7), 5.0).double())


def test_all_heads_shared():
    x, w_s = torch.randn(2, 3, 5), torch.randn(4, 5)
    found = moh_gates(x, None, w_s, None, 0)
    torch.testing.assert_close(found.gates, 4 * (x @ w_s.T).softmax(-1))
    assert found.chosen.shape == (2, 3, 0)
    layer = MixtureOfHeads(8, 4, 4, 0).train()
    layer(torch.randn(1, 3, 8))
    assert layer.aux_loss is None and layer.router.routed is None


def test_one_shared_head_has_no_matrix_and_weight_one():
    layer: Any = MixtureOfHeads(8, 4, 1, 2)
    assert layer.router.shared is None
    x = torch.randn(1, 3, 8)
    nn.init.zeros_(layer.router.balance.weight)
    torch.testing.assert_close(layer.router(x).gates[..., 0], torch.ones(1, 3))


def dense_twin(layer: MixtureOfHeads) -> SoftmaxAttention:
    width = layer.num_heads * layer.head_dim
    twin = SoftmaxAttention(width, layer.num_heads, num_kv_heads=layer.num_kv_heads, is_causal=layer.is_causal)
    twin.qkv.load_state_dict(layer.qkv.state_dict())
    twin.proj.load_state_dict(layer.proj.state_dict())
    return twin


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"is_causal": True}])
def test_zero_routers_that_choose_all_are_plain_attention(options):
    layer = MixtureOfHeads(32, 8, 2, 6, **options).eval()
    for weight in layer.router.parameters():
        nn.init.zeros_(weight)
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    twin = dense_twin(layer)
    torch.testing.assert_close(layer(x), twin(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(x, mask)[mask], twin(x, mask)[mask], atol=1e-6, rtol=1e-6)


def test_gates_stand_before_the_output_projection_per_token():
    layer = MixtureOfHeads(16, 4, 1, 2).eval()
    x = torch.randn(2, 6, 16)
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    heads = (q @ k.mT / 2).softmax(-1) @ v
    wanted = layer.proj.bias.expand(2, 6, 16).clone()
    gates = layer.router(x).gates
    for head in range(4):
        block = layer.proj.weight[:, 4 * head : 4 * head + 4]
        wanted = wanted + gates[..., head, None] * (heads[:, head] @ block.T)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


def test_permuting_routed_heads_changes_nothing():
    layer: Any = MixtureOfHeads(24, 6, 2, 2).eval()
    twin, order = copy.deepcopy(layer), [0, 1, 5, 3, 2, 4]
    rows = torch.cat([torch.arange(4) + 4 * head for head in order])
    with torch.no_grad():
        twin.router.routed.weight.copy_(layer.router.routed.weight[[head - 2 for head in order[2:]]])
        every = torch.cat([rows, rows + 24, rows + 48])
        twin.qkv.weight.copy_(layer.qkv.weight[every])
        twin.qkv.bias.copy_(layer.qkv.bias[every])
        twin.proj.weight.copy_(layer.proj.weight[:, rows])
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(twin(x), layer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_sparse_path_gives_the_same(router, is_causal):
    layer = MixtureOfHeads(32, 8, 3, 2, router, num_kv_heads=4, is_causal=is_causal, implementation="dense").eval()
    sparse = copy.deepcopy(layer)
    sparse.implementation = "sparse"
    x, mask = torch.randn(3, 21, 32), torch.ones(3, 21, dtype=torch.bool)
    mask[0, :4] = mask[1, 15:] = mask[2] = False
    torch.testing.assert_close(sparse(x), layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sparse(x, mask), layer(x, mask), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(layer(x, mask)).all(), "an item that is all padding"


# --- the query-norm router ---


def official(q, shared, k):
    """What the released inference code does with the heads that are not shared, in its order of operations."""
    norms = torch.norm(q, dim=-1).transpose(1, 2)[..., shared:]
    scores = torch.softmax(norms / norms.std(dim=-1, keepdim=True), -1)
    chosen = torch.topk(scores, k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, chosen, 1.0)


@pytest.mark.parametrize(("shared", "k"), [(4, 2), (2, 3), (0, 5)])
def test_the_norm_router_is_the_official_one(shared, k):
    q = torch.randn(2, 8, 50, 16)
    found = norm_router(q, shared, k)
    assert torch.equal(found.gates[..., shared:], official(q, shared, k))
    assert torch.equal(found.gates[..., :shared], torch.ones(2, 50, shared))


def test_the_released_mask_is_right_only_for_halves():
    """There the shared part is a copy of ones as wide as the routed part; ours is as wide as it should be."""
    assert norm_router(torch.randn(1, 8, 3, 4), 2, 3).gates.shape == (1, 3, 8)


def test_rotation_and_scale_leave_the_norm_router_alone():
    q = torch.randn(1, 6, 9, 8).double()
    rotation = torch.linalg.qr(torch.randn(8, 8).double()).Q
    before = norm_router(q, 2, 2)
    for changed in (q @ rotation, q * 0.125):
        after = norm_router(changed, 2, 2)
        assert torch.equal(after.chosen, before.chosen)
        torch.testing.assert_close(after.probabilities, before.probabilities)


def test_binary_gates_carry_the_gradient_of_the_scores():
    q = torch.randn(1, 6, 4, 8).double().requires_grad_()
    upstream = torch.randn(1, 4, 6).double()
    found = norm_router(q, 2, 2)
    assert set(found.gates.unique().tolist()) == {0.0, 1.0}, "exactly"
    (through,) = torch.autograd.grad((found.gates * upstream).sum(), q, retain_graph=True)
    (soft,) = torch.autograd.grad((found.probabilities * upstream[..., 2:]).sum(), q)
    torch.testing.assert_close(through, soft)
    assert through[:, 2:].abs().min() > 0, "unchosen heads too"


def test_learned_gates_have_the_gradient_of_the_renormalised_scores():
    weights = [torch.randn(*shape).double().requires_grad_() for shape in ((5, 4), (2, 4), (2, 4))]
    x = torch.randn(1, 3, 4).double()
    assert torch.autograd.gradcheck(lambda *w: moh_gates(x, *w, k=2).gates, weights)


def test_equal_scores_choose_the_lower_heads_and_finite_gates():
    x = torch.randn(1, 3, 4)
    learned = moh_gates(x, torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(2, 4), 2)
    assert learned.chosen.tolist() == [[[True, True, False, False, False]] * 3]
    norms = norm_router(torch.ones(1, 6, 3, 4), 2, 2)
    assert norms.chosen[0, 0].tolist() == [True, True, False, False] and torch.isfinite(norms.gates).all()


def test_nan_is_not_hidden():
    x = torch.randn(1, 3, 4)
    x[0, 1] = torch.nan
    gates = moh_gates(x, torch.randn(5, 4), torch.randn(2, 4), torch.randn(2, 4), 2).gates
    assert gates[0, 1].isnan().any() and not gates[0, [0, 2]].isnan().any()
    q = torch.randn(1, 6, 3, 4)
    q[0, 4, 1] = torch.nan
    gates = norm_router(q, 2, 2).gates
    assert gates[0, 1, 2:].isnan().all() and not gates[0, [0, 2]].isnan().any()


# --- the loss ---


def routed_of(probabilities, k):
    order = probabilities.argsort(-1, descending=True)[..., :k]
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, True)
    return HeadGates(probabilities, probabilities, chosen)


def test_the_loss_by_a_loop_and_at_its_ends():
    p = torch.rand(2, 9, 6).double().softmax(-1)
    routed = routed_of(p, 2)
    real = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    for mask in (None, real):
        tokens = [(b, t) for b in range(2) for t in range(9) if mask is None or mask[b, t]]
        wanted = 0.0
        for i in range(6):
            mean_p = sum(float(p[b, t, i]) for b, t in tokens) / len(tokens)
            share = sum(float(routed.chosen[b, t, i]) for b, t in tokens) / len(tokens)
            wanted += 6 * mean_p * share
        assert float(load_balance(routed, mask)) == pytest.approx(wanted, abs=1e-12)
    even = HeadGates(p, torch.full((1, 6, 6), 1 / 6), torch.eye(6).bool()[None])
    assert float(load_balance(even)) == pytest.approx(1.0), "k at even use"
    collapsed = torch.tensor([1.0, 0, 0, 0, 0, 0]).expand(1, 6, 6)
    assert float(load_balance(HeadGates(p, collapsed, collapsed.bool()))) == 6.0, "E at collapse"


def test_padding_takes_no_part_in_the_loss():
    layer: Any = MixtureOfHeads(16, 8, 2, 3).train()
    x = torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    layer(x, mask)
    padded = layer.aux_loss
    layer(x[:, :5])
    torch.testing.assert_close(padded, layer.aux_loss)
    layer(x, torch.zeros_like(mask))
    assert layer.aux_loss.item() == 0.0


class Two(nn.Module):
    def __init__(self, first: int = 2):
        super().__init__()
        self.layers: Any = nn.ModuleList(
            [MixtureOfHeads(16, 8, first, 8 - first if first == 8 else 3), MixtureOfHeads(16, 8, 2, 3)]
        )

    def forward(self, x, recompute=False):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


def test_the_loss_belongs_to_its_model_and_is_the_mean_over_routing_layers():
    one, other, x = Two().train(), Two().train(), torch.randn(2, 5, 16)
    one(x)
    first = moh_loss(one)
    other(-x)
    assert torch.equal(moh_loss(one), first), "another model's forward is not in it"
    torch.testing.assert_close(first, sum(layer.aux_loss for layer in one.layers) / 2)
    one(x)
    assert torch.equal(moh_loss(one), first), "nothing adds up over steps"
    shared = Two(first=8).train()
    shared(x)
    assert torch.equal(moh_loss(shared), shared.layers[1].aux_loss), "a layer whose heads are all shared has none"
    first.backward()
    assert one.layers[0].router.routed.weight.grad.any()


def test_checkpointing_counts_a_layer_once():
    model, x = Two().train(), torch.randn(2, 5, 16)
    model(x)
    plain = moh_loss(model)
    out = model(x, recompute=True)
    loss = moh_loss(model)
    torch.testing.assert_close(loss, plain)
    (out.sum() + loss).backward()
    torch.testing.assert_close(moh_loss(model), plain)


def test_without_a_loss_it_says_why():
    model = Two()
    with pytest.raises(ValueError, match="Two has 2 layers"):
        moh_loss(model)
    model.train()(torch.randn(1, 3, 16))
    moh_loss(model)
    copy.deepcopy(model)  # the graph of the loss does not travel
    model.eval()(torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="training mode"):
        moh_loss(model)
    with pytest.raises(ValueError, match="0 layers"):
        moh_loss(nn.Linear(2, 2))


# --- probes and edits ---


def test_edits_change_what_is_gated():
    layer, x = MixtureOfHeads(16, 4, 1, 2).eval(), torch.randn(2, 6, 16)
    plain = layer(x)
    outputs, contribution = HeadOutputs(), Contribution()
    with hw.probe(layer, outputs, contribution):
        torch.testing.assert_close(layer(x), plain, atol=1e-6, rtol=1e-5)
    gates, seen = layer.router(x).gates, outputs.values["", 0]
    assert not seen[gates == 0].any() and seen[gates != 0].any(), "probes of outputs see the gated value"
    torch.testing.assert_close(layer.proj(seen.flatten(2)), plain, atol=1e-6, rtol=1e-5)
    with hw.steer(layer, ScaleHeads(0.0, heads=["0.1"])):
        wanted = seen.clone()
        wanted[:, :, 1] = 0
        torch.testing.assert_close(layer(x), layer.proj(wanted.flatten(2)), atol=1e-6, rtol=1e-5)
    with hw.steer(layer, Ablate(heads=["0.0"], mode="uniform")):
        values = layer.qkv(x)[..., 32:36].mean(1, keepdim=True)
        wanted = seen.clone()
        wanted[:, :, 0] = values * gates[..., :1]
        torch.testing.assert_close(layer(x), layer.proj(wanted.flatten(2)), atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x), plain)


# --- sizes ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MixtureOfHeads(16, 4, 2, 3), "top_k 3"),
        (lambda: MixtureOfHeads(16, 4, 5, 0), "num_shared 5"),
        (lambda: MixtureOfHeads(16, 4, 0, 0), "top_k 0"),
        (lambda: MixtureOfHeads(16, 4, 2, 0), "top_k 0"),
        (lambda: MixtureOfHeads(16, 4, -1, 2), "num_shared -1"),
        (lambda: MixtureOfHeads(16, 4, num_kv_heads=3), "num_kv_heads 3"),
        (lambda: inspect.unwrap(MixtureOfHeads.__init__)(MixtureOfHeads(16, 4), 16, 4, router="norm"), "'norm'"),
        (lambda: MixtureOfHeads(16, 4, 3, 1, "query_norm"), "at least 2"),
        (lambda: QueryNormRouter(4, 3, 1), "at least 2"),
        (lambda: LearnedRouter(8, 4, 2, 3), "LearnedRouter: 4 heads"),
        (lambda: norm_router(torch.ones(1, 4, 2, 3), 3, 1), "at least 2"),
        (lambda: moh_gates(torch.ones(1, 2, 3), torch.ones(4, 3), torch.ones(2, 3), None, 2), "missing"),
        (lambda: moh_gates(torch.ones(1, 2, 3), torch.ones(4, 3), None, None, 5), "top_k 5"),
        (lambda: head_split(8, active=0.2, shared=0.2), "rounded"),
        (lambda: head_split(8, active=1.5), "active 1.5"),
        (lambda: head_split(8, active=0.5, shared=0.75), "shared 0.75"),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_shares_become_whole_heads():
    assert head_split(32) == (32, 16, 8) and head_split(32).active == 0.75
    assert head_split(6, active=0.7, shared=0.5) == (6, 3, 1)
    assert head_split(4, active=1.0, shared=1.0) == (4, 4, 0)
    assert "2 shared, 1 of 2 routed, 75.0% active" in repr(MixtureOfHeads(16, 4))


def test_head_size_may_differ_from_the_width():
    layer = MixtureOfHeads(16, 24, 16, 3, head_dim=6)
    assert layer(torch.randn(1, 4, 16)).shape == (1, 4, 16) and layer.proj.in_features == 144


def test_routers_start_small_and_apart():
    torch.manual_seed(0)
    router: Any = LearnedRouter(64, 16, 4, 6)
    for one in (router.routed, router.shared, router.balance):
        assert one.bias is None and one.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert router(torch.randn(1, 200, 64)).chosen.any(1).all(), "no head is out of use at the start"
