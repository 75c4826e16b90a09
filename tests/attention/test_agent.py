"""Agent attention against its equation, its limits and softmax attention."""

import math

import pytest
import torch
from tests.compiling import assert_compiles
from torch import nn

import headwise as hw
from headwise.attend import Ablate
from headwise.attention import AgentAttention, agent_attention, agent_map
from headwise.attention._agent_blocks import BLOCK
from headwise.errors import UnsupportedModel

SDPA = nn.functional.scaled_dot_product_attention


def drawn(b=2, h=3, t=11, s=11, n=4, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(b, h, size, d, generator=generator, dtype=torch.float64).to(dtype) for size in (t, s, s, n)]


def loop(q, k, v, agents, *, first, second, scale, query_scale, keys, living, shortcut):
    """The equation, token by token, in plain Python."""
    b, h, t, _ = q.shape
    out = torch.zeros(b, h, t, v.shape[-1], dtype=q.dtype)
    for i in range(b):
        for j in range(h):
            gathered = []
            for a in range(agents.shape[2]):
                mass, total = 0.0, torch.zeros(v.shape[-1], dtype=q.dtype)
                for s in range(k.shape[2]):
                    if keys[i, s]:
                        score = scale * float(agents[i, j, a] @ k[i, j, s]) + float(first[0, j, a, s])
                        mass += math.exp(score)
                        total = total + math.exp(score) * v[i, j, s]
                gathered.append(total / mass if mass else total)
            for row in range(t):
                mass, total = 0.0, torch.zeros(v.shape[-1], dtype=q.dtype)
                for a in range(agents.shape[2]):
                    if living[i, a]:
                        score = query_scale * float(q[i, j, row] @ agents[i, j, a]) + float(second[0, j, row, a])
                        mass += math.exp(score)
                        total = total + math.exp(score) * gathered[a]
                out[i, j, row] = (total / mass if mass else total) + shortcut * v[i, j, row]
    return out


@pytest.mark.parametrize("implementation", ["plain", "blocked", "fused", "auto"])
def test_the_equation(implementation, monkeypatch):
    monkeypatch.setattr("headwise.attention._agent_blocks.BLOCK", 4)
    q, k, v, agents = drawn(t=9, s=9)
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 3, 4, 9, generator=generator, dtype=torch.float64)
    second = torch.randn(1, 3, 9, 4, generator=generator, dtype=torch.float64)
    keys = torch.rand(2, 9, generator=generator) > 0.3
    living = torch.tensor([[True, True, True, True], [True, False, True, False]])
    found = agent_attention(
        q, k, v, agents, bias_agent_key=first, bias_query_agent=second, scale=0.3, query_scale=0.7, key_mask=keys,
        agent_mask=living, v_shortcut=0.075, implementation=implementation,
    )  # fmt: skip
    wanted = loop(
        q, k, v, agents, first=first, second=second, scale=0.3, query_scale=0.7, keys=keys, living=living,
        shortcut=0.075,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_two_calls_of_torchs_attention():
    q, k, v, agents = drawn(dtype=torch.float32)
    torch.testing.assert_close(agent_attention(q, k, v, agents), SDPA(q, agents, SDPA(agents, k, v)))


def test_the_map_is_stochastic_and_of_low_rank():
    q, k, v, agents = drawn()
    whole = agent_map(q, k, agents, query_scale=1.0)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 3, 11, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (whole >= 0).all()
    assert (torch.linalg.svdvals(whole)[..., 4:] < 1e-12).all()
    torch.testing.assert_close(agent_attention(q, k, v, agents, query_scale=1.0), whole @ v, atol=1e-12, rtol=0)
    hand_out, gather = agent_map(q, k, agents, query_scale=1.0, factors=True)
    torch.testing.assert_close((hand_out @ gather) @ v, hand_out @ (gather @ v), atol=1e-12, rtol=0)


def test_keys_as_sharp_agents_give_softmax_attention():
    q, k, v, _ = drawn(s=7)
    k = nn.functional.normalize(k, dim=-1)
    found = agent_attention(q, k, v, k, scale=1e6, query_scale=8**-0.5)
    torch.testing.assert_close(found, SDPA(q, k, v), atol=1e-12, rtol=0)


def test_one_agent_gives_every_query_the_same():
    q, k, v, agents = drawn(n=1)
    out = agent_attention(q, k, v, agents)
    torch.testing.assert_close(out, SDPA(agents, k, v).expand_as(out))


def test_constant_values_stay():
    q, k, v, agents = drawn()
    out = agent_attention(q, k, torch.ones_like(v), agents)
    torch.testing.assert_close(out, torch.ones_like(v))


def test_permutations():
    q, k, v, agents = drawn()
    bias = torch.randn(1, 3, 4, 11, dtype=torch.float64)
    plain = agent_attention(q, k, v, agents, bias_agent_key=bias)
    order = torch.randperm(11)
    moved = agent_attention(q, k[:, :, order], v[:, :, order], agents, bias_agent_key=bias[..., order])
    torch.testing.assert_close(moved, plain)
    moved = agent_attention(q[:, :, order], k, v, agents, bias_agent_key=bias)
    torch.testing.assert_close(moved, plain[:, :, order])


@pytest.mark.parametrize("implementation", ["plain", "blocked", "fused"])
def test_grouped_keys_are_repeated_keys(implementation):
    q, k, v, agents = drawn(h=4, t=6, s=9)
    k, v = k[:, :2], v[:, :2]
    wanted = agent_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), agents)
    torch.testing.assert_close(agent_attention(q, k, v, agents, implementation=implementation), wanted)


@pytest.mark.parametrize("implementation", ["plain", "blocked", "fused"])
def test_nothing_to_see_is_zero_with_gradient_zero(implementation):
    q, k, v, agents = drawn(b=2)
    keys = torch.ones(2, 11, dtype=torch.bool)
    keys[1] = False
    if implementation != "blocked":
        k.requires_grad_()
    out = agent_attention(q, k, v, agents, key_mask=keys, implementation=implementation)
    assert not out[1].any() and out[0].all()
    if implementation != "blocked":
        (gradient,) = torch.autograd.grad(out.sum(), k)
        assert torch.isfinite(gradient).all() and not gradient[1].any()
    keys = torch.tensor([[True] * 4, [False] * 4])
    assert not agent_attention(q, k.detach(), v, agents, agent_mask=keys, implementation=implementation)[1].any()


def test_gradients():
    inputs = [x.requires_grad_() for x in drawn(b=1, h=2, t=3, s=4, n=2, d=3)]
    bias = torch.randn(1, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: agent_attention(*x[:4], bias_agent_key=x[4], query_scale=1.1), [*inputs, bias])


def test_blocks_agree():
    q, k, v, agents = drawn(b=1, h=1, t=BLOCK + 5, s=2 * BLOCK + 1, dtype=torch.float32)
    k[:, :, -1] = 30 * agents[:, :, 0]  # the largest score comes last
    wanted = agent_attention(q, k, v, agents, implementation="plain")
    torch.testing.assert_close(agent_attention(q, k, v, agents, implementation="blocked"), wanted, atol=1e-5, rtol=1e-4)


def test_scores_in_another_dtype():
    q, k, v, agents = (x * 200 for x in drawn(dtype=torch.float16))
    out = agent_attention(q, k, v / 200, agents, logits_dtype=torch.float32, scale=1.0)
    wanted = agent_attention(q.double(), k.double(), v.double() / 200, agents.double(), scale=1.0)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), wanted, atol=2e-2, rtol=2e-2)
    assert not torch.isfinite(agent_attention(q, k, v / 200, agents, scale=1.0, implementation="plain")).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_causal": True}, "there is no causal form"),
        ({"v_shortcut": 0.1, "q": torch.zeros(2, 3, 5, 8)}, "11 values do not belong to 5 queries"),
        ({"bias_agent_key": torch.zeros(1, 3, 4, 12)}, r"bias_agent_key is \(1, 3, 4, 12\); it must broadcast"),
        ({"bias_query_agent": torch.zeros(11, 4)}, "bias_query_agent"),
        ({"agents": torch.zeros(2, 3, 0, 8)}, "no agents"),
        ({"implementation": "blocked", "dropout": 0.5}, "neither gradients nor dropout"),
    ],
)
def test_what_is_refused(changes, said):
    q, k, v, agents = drawn(dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "agents": agents, **changes}
    with pytest.raises(ValueError, match=said):
        agent_attention(**given)


# --- the layer ------------------------------------------------------------------------------------------------------

X = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))


def layer(**options) -> AgentAttention:
    torch.manual_seed(0)
    return AgentAttention(32, 4, **{"num_agents": 4, "grid_size": (3, 4), "num_prefix_tokens": 1, **options}).eval()


def by_hand(module: AgentAttention, x, places, prefix=1):
    """The layer from its parameters, one step after another."""
    b, t, c = x.shape
    h, n, d = module.num_heads, module.num_agents, module.head_dim
    q, k, v = module.qkv(x).chunk(3, -1)
    pooled = nn.functional.adaptive_avg_pool2d(q[:, prefix:].mT.reshape(b, c, *places), module.windows)
    heads = [y.reshape(b, -1, h, d).transpose(1, 2) for y in (q, k, v, pooled.flatten(2).mT)]
    first = nn.functional.interpolate(module.an_bias, places, mode="bilinear")
    first = (first + module.ah_bias[0] + module.aw_bias[0]).reshape(1, h, n, -1)
    second = nn.functional.interpolate(module.na_bias, places, mode="bilinear").permute(0, 2, 3, 1)
    second = (second + module.ha_bias[0] + module.wa_bias[0]).reshape(1, h, -1, n)
    if prefix:
        first, second = torch.cat([module.ac_bias, first], -1), torch.cat([module.ca_bias, second], 2)
    out = agent_attention(*heads, bias_agent_key=first, bias_query_agent=second).transpose(1, 2).reshape(b, t, c)
    local = module.dwc(v[:, prefix:].mT.reshape(b, c, *places)).flatten(2).mT
    return module.proj(torch.cat([out[:, :prefix], out[:, prefix:] + local], 1))


@pytest.mark.parametrize(("places", "prefix", "agents"), [((3, 4), 1, 4), ((6, 2), 1, (3, 2)), ((12, 1), 1, (2, 1))])
def test_the_layer_on_a_grid(places, prefix, agents):
    module = layer(grid_size=places, num_agents=agents)
    torch.testing.assert_close(module(X), by_hand(module, X, places, prefix))
    module = layer(grid_size=(13, 1), num_agents=(3, 1), num_prefix_tokens=0)
    torch.testing.assert_close(module(X), by_hand(module, X, (13, 1), 0))


def test_several_prefix_tokens_are_neither_pooled_nor_convolved():
    module = layer(grid_size=(3, 3), num_prefix_tokens=4, position_bias=False)
    other = X.clone()
    other[:, :4] += 1
    values = module.qkv(X)[..., 64:]
    assert not module._convolved(values, (3, 3), None)[:, :4].any()
    q, p = module.qkv(X)[..., :32], module.qkv(other)[..., :32]
    heads = q.view(2, 13, 4, 8).transpose(1, 2)
    torch.testing.assert_close(module._agents(q, heads, (3, 3), None)[0], module._agents(p, heads, (3, 3), None)[0])
    assert layer(grid_size=(3, 3), num_prefix_tokens=4).ac_bias.shape == (1, 4, 4, 4)


def test_a_padded_sequence_is_the_short_one():
    """Wherever the padding stands: padded queries are no agents, padded values are not convolved."""
    torch.manual_seed(0)
    module = AgentAttention(32, 4, 3, position_bias=False).eval()
    wanted = module(X[:1, :9])
    for start in (0, 4):
        x, mask = 100 * torch.ones(1, 13, 32), torch.zeros(1, 13, dtype=torch.bool)
        x[:, start : start + 9], mask[:, start : start + 9] = X[:1, :9], True
        torch.testing.assert_close(module(x, mask)[:, start : start + 9], wanted)


def test_masked_tokens_of_a_grid_have_no_influence():
    module = layer(num_agents=4)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, [1, 2, 5, 6]] = False  # the first of the 2 x 2 windows is empty
    other = X.clone()
    other[1, [1, 2, 5, 6]] = 50.0
    shown = mask[1]
    torch.testing.assert_close(module(other, mask)[1, shown], module(X, mask)[1, shown])
    torch.testing.assert_close(module(X, mask)[0], module(X)[0])
    assert not torch.allclose(module(X, mask)[1, shown], module(X)[1, shown])


def test_cross_attention_gathers_from_the_context():
    module, context = layer(dwc=False), torch.randn(2, 5, 32)
    mask = torch.tensor([[True] * 5, [True, True, False, False, True]])
    out = module(X, context=context, context_mask=mask)
    assert out.shape == X.shape and not torch.allclose(out, module(X))
    other = context.clone()
    other[1, 2:4] = 9.0
    torch.testing.assert_close(module(X, context=other, context_mask=mask), out)
    same = layer(dwc=False, position_bias=False)
    torch.testing.assert_close(same(X, context=X), same(X))


def test_tables_fit_another_grid():
    module = layer()
    x = torch.randn(2, 1 + 6 * 8, 32)
    with pytest.raises(ValueError, match="49 tokens are not 1 prefix tokens and a grid of 3 x 4"):
        module(x)
    out = module(x, grid_size=(6, 8))
    first, second = module.biases((6, 8))
    assert first.shape == (1, 4, 4, 49) and second.shape == (1, 4, 49, 4)
    module.resize_grid((6, 8))
    assert module.ah_bias.shape == (1, 4, 4, 6, 1) and module.wa_bias.shape == (1, 4, 1, 8, 4)
    torch.testing.assert_close(module(x), out)
    module.resize_grid((6, 8))
    torch.testing.assert_close(module(x), out)
    with pytest.raises(ValueError, match="1 x 8 tokens would repeat"):
        module.resize_grid((1, 8))


def test_learned_agents_and_those_of_a_function():
    module = layer(agents="learned", num_agents=5)
    assert module.agents is not None and module.agents.shape == (4, 5, 8)
    module(X).sum().backward()
    assert module.agents.grad is not None and module.agents.grad.any()
    first = layer(agents=lambda q: q[:, :, :3], num_agents=3)
    assert torch.isfinite(first(X)).all()


def test_the_shortcut_and_the_second_scale():
    module, plain = layer(v_shortcut=0.075, dwc=False), layer(dwc=False)
    v = plain.qkv(X)[..., 64:]
    torch.testing.assert_close(module(X) - plain(X), nn.functional.linear(0.075 * v, plain.proj.weight))
    assert not torch.allclose(layer(query_scale=8**-0.15)(X), layer()(X))


def test_dropout_is_for_training():
    module = layer(dropout=0.5)
    torch.testing.assert_close(module(X), layer()(X))
    module.train()
    assert not torch.allclose(module(X), module(X))


def test_heads_are_edited_and_weights_refused():
    module = layer()
    plain = module(X)
    with hw.steer(module, Ablate(heads="0.2", mode="zero")):
        out = module(X)
    with torch.no_grad():
        module.proj.weight[:, 16:24] = 0
    torch.testing.assert_close(out, module(X))
    assert not torch.allclose(out, plain)
    with hw.steer(module, Ablate(heads="0.1", mode="uniform")), pytest.raises(UnsupportedModel, match="layer 0"):
        module(X)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_agents": 5}, "num_agents is 5, no square number"),
        ({"num_agents": 16}, "4 x 4 agents on a grid of 3 x 4 tokens would repeat"),
        ({"num_agents": 0}, "num_agents is 0"),
        ({"agents": "mean"}, "agents is 'mean'"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens -1"),
    ],
)
def test_what_the_layer_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        layer(**options)


def test_masks_of_pairs_and_wrong_grids_are_refused():
    with pytest.raises(ValueError, match="a mask of pairs cannot be expressed"):
        layer()(X, torch.ones(2, 13, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match="12 tokens are not 1 prefix tokens and a grid of 3 x 4"):
        layer()(X[:, :12])
    with pytest.raises(ValueError, match="1 tokens leave none after 1 prefix tokens"):
        layer(grid_size=None)(X[:, :1])
    with pytest.raises(ValueError, match="made for sequences"):
        layer(grid_size=None)(X, grid_size=(3, 4))
    with pytest.raises(ValueError, match="has no grid"):
        layer(grid_size=None).resize_grid((3, 4))


@pytest.mark.slow
def test_it_compiles_in_one_piece():
    module = layer()
    assert_compiles(module, X, fullgraph=True)
