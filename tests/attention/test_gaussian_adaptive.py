"""Gaussian adaptive attention: its definition by loops, the released code, its limits, masks and refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.compiling import assert_compiles
from torch.distributions import Categorical, MixtureSameFamily, Normal

import headwise as hw
from headwise.attend.edits import Ablate
from headwise.attention import (
    GaussianAdaptiveAttention,
    GaussianAdaptiveBlock,
    gaussian_attention_weights,
    importance_factor,
    load_official_state_dict,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gaussian_adaptive.safetensors"
D = torch.float64


def oracle() -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(FIXTURE, "pt") as peer:
        return {name: peer.get_tensor(name) for name in peer.keys()}, json.loads(peer.metadata()["cases"])  # noqa: SIM118


def state_of(data: dict[str, torch.Tensor], stem: str) -> dict[str, torch.Tensor]:
    start = f"{stem}state/"
    return {name.removeprefix(start): value for name, value in data.items() if name.startswith(start)}


def by_loops(x, offset, width):
    """Rows of a matrix, one Gaussian after the other."""
    out = torch.zeros_like(x)
    for row in range(len(x)):
        values = x[row]
        mean, sigma = values.sum() / len(values), (values.var() + 1e-8).sqrt()
        for place, value in enumerate(values):
            product = torch.ones((), dtype=x.dtype)
            for delta, c in zip(offset, width, strict=True):
                z = (value - mean - delta) / sigma
                product = product * torch.exp(-(z**2) / (2 * c**2)) / (2 * math.pi * c**2).sqrt()
            out[row, place] = product
        out[row] /= out[row].sum()
    return out


def parameters(k, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(k, generator=rng, dtype=D), 0.5 + torch.rand(k, generator=rng, dtype=D)


@given(st.integers(1, 6), st.integers(2, 9))
def test_a_product_of_gaussians_is_one_softmax(k, length):
    offset, width = parameters(k, k)
    x = torch.randn(3, length, dtype=D, generator=torch.Generator().manual_seed(length)) * 2 + 5
    torch.testing.assert_close(
        gaussian_attention_weights(x, offset, width), by_loops(x, offset, width), atol=1e-12, rtol=1e-9
    )


@pytest.mark.parametrize("name", ["features", "time", "matrix", "four axes"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_released_code_agrees(name, dtype):
    """With any axis, number of Gaussians and a remainder in the last head, and with widths below 0."""
    data, cases = oracle()
    _, axis, heads, gaussians, _ = cases[name]
    stem = f"{dtype}/{name}/"
    x = data[stem + "x"]
    module = GaussianAdaptiveAttention(heads, gaussians, axis).to(x.dtype)
    load_official_state_dict(
        module,
        {key.removeprefix(stem + "state/"): value for key, value in data.items() if key.startswith(stem + "state/")},
    )
    out, weights = module(x, return_weights=True)
    bound = 2e-6 if dtype == "float32" else 1e-14
    torch.testing.assert_close(weights, data[stem + "weights"], atol=bound, rtol=bound)
    torch.testing.assert_close(out, data[stem + "y"], atol=bound, rtol=bound)
    module.official_clamp = True
    torch.testing.assert_close(module(x), data[stem + "y"], atol=bound, rtol=bound)


def test_the_released_padding_is_an_option():
    data, _ = oracle()
    stem = "float64/padded/"
    x, y = data[stem + "x"], data[stem + "y"]
    module = GaussianAdaptiveAttention(1, 2, 1, padding_value=0.0).double()
    load_official_state_dict(
        module,
        {key.removeprefix(stem + "state/"): value for key, value in data.items() if key.startswith(stem + "state/")},
    )
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(out, y, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(weights, data[stem + "weights"], atol=1e-14, rtol=1e-14)
    assert torch.equal(out[1, 6:], x[1, 6:])


def test_a_block_of_the_released_code():
    data, _ = oracle()
    block = GaussianAdaptiveBlock(2, [2, 1], 2, [-1, 1]).double()
    load_official_state_dict(block, state_of(data, "block/"))
    out, weights = block(data["block/x"], return_weights=True)
    torch.testing.assert_close(out, data["block/y"], atol=1e-13, rtol=1e-13)
    assert len(weights) == 2 and weights[0].shape == out.shape


def test_padding_has_no_influence_where_the_released_code_lets_it():
    torch.manual_seed(0)
    x = torch.randn(1, 10, 1, dtype=D) + 2
    padded = torch.cat([x, torch.zeros(1, 10, 1, dtype=D)], 1)
    mask = torch.arange(20)[None] < 10
    ours = GaussianAdaptiveAttention(1, dim=1, width_init=1.0).double()
    torch.testing.assert_close(ours.weights(padded, mask)[:, :10], ours.weights(x), atol=1e-14, rtol=0)
    assert not ours.weights(padded, mask)[:, 10:].any()
    theirs = GaussianAdaptiveAttention(1, dim=1, width_init=1.0, padding_value=0.0).double()
    assert (theirs.weights(padded)[:, :10] - theirs.weights(x)).abs().max() > 0.01


def test_hidden_rows_weigh_nothing():
    x, mask = torch.randn(2, 5, 4, requires_grad=True), torch.tensor([[True] * 5, [False] * 5])
    module = GaussianAdaptiveAttention(2, dim=1, head_dim_axis=-1, combine="sum", num_gaussians=2)
    out, weights = module(x, mask, return_weights=True)
    assert not weights[1].any() and not out[1].any() and torch.isfinite(out).all()
    out.square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and not x.grad[1].any()


def test_limits_of_the_width():
    x = torch.tensor([[1.0, 2.0, 4.0, 9.0]], dtype=D)
    one = torch.ones(1, dtype=D)
    torch.testing.assert_close(gaussian_attention_weights(x, 0 * one, 1e6 * one), torch.full_like(x, 0.25))
    nearest = gaussian_attention_weights(x, 0.1 * one, 1e-3 * one)  # mean 4 + 0.1
    torch.testing.assert_close(nearest, torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=D))


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_scale_and_place_of_x_do_not_matter(combine):
    offset, width = parameters(3)
    x = torch.randn(2, 7, dtype=D)
    before = gaussian_attention_weights(x, offset, width, combine=combine)
    after = gaussian_attention_weights(5 * x - 3, 5 * offset, width, combine=combine)
    torch.testing.assert_close(after, before, atol=1e-7, rtol=0)  # up to eps in the variance
    units = gaussian_attention_weights(5 * x - 3, offset, width, combine=combine, offset_units="sigma")
    torch.testing.assert_close(
        units, gaussian_attention_weights(x, offset, width, combine=combine, offset_units="sigma"), atol=1e-7, rtol=0
    )


def test_a_sum_of_one_is_a_product_of_one():
    offset, width = parameters(1)
    x = torch.randn(3, 8, dtype=D)
    torch.testing.assert_close(
        gaussian_attention_weights(x, offset, width, combine="sum"), gaussian_attention_weights(x, offset, width)
    )


def test_a_sum_is_the_mixture_density():
    offset, width = parameters(4)
    mixture, x = torch.randn(4, dtype=D), torch.randn(3, 8, dtype=D)
    sigma = (x.var(-1, keepdim=True) + 1e-8).sqrt()
    rows = []
    for row, scale in zip(x - x.mean(-1, keepdim=True), sigma, strict=True):
        density = MixtureSameFamily(Categorical(logits=mixture), Normal(offset, width * scale))
        rows.append(density.log_prob(row).softmax(0))
    torch.testing.assert_close(
        gaussian_attention_weights(x, offset, width, combine="sum", mixture=mixture), torch.stack(rows)
    )


def test_a_sum_has_two_modes_and_a_product_never():
    x = torch.linspace(-2, 2, 41, dtype=D)[None]
    offset, width = torch.tensor([-1.5, 1.5], dtype=D), torch.tensor([0.3, 0.3], dtype=D)
    for combine, modes in (("sum", 2), ("product", 1)):
        weights = gaussian_attention_weights(x, offset, width, combine=combine)[0]
        rises = (weights[1:] > weights[:-1]).int()
        assert int((rises[:-1] > rises[1:]).sum()) == modes


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("units", ["input", "sigma"])
def test_gradients(combine, units):
    x, offset, width = torch.randn(2, 5, dtype=D), *parameters(3)
    inputs = [one.requires_grad_() for one in (x, offset, width)]

    def weights(*given):
        return gaussian_attention_weights(*given, combine=combine, offset_units=units)

    assert torch.autograd.gradcheck(weights, inputs)
    mask = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(
        lambda *given: gaussian_attention_weights(*given, combine=combine, mask=mask), inputs
    )


def test_heads_split_time_or_features_as_told():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8, dtype=D)
    times = GaussianAdaptiveAttention(3, 2, dim=1).double()
    features = GaussianAdaptiveAttention(4, 2, dim=1, head_dim_axis=-1).double()
    for module in (times, features):
        module.offset.data.normal_()
    weights = times.weights(x)
    torch.testing.assert_close(weights.unflatten(1, (3, 4)).sum(2), torch.ones(2, 3, 8, dtype=D))
    for head in range(3):
        part = gaussian_attention_weights(
            x[:, 4 * head : 4 * head + 4], times.offset[head], times.log_width[head].exp(), 1
        )
        torch.testing.assert_close(weights[:, 4 * head : 4 * head + 4], part)
    weights = features.weights(x)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 8, dtype=D))
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        one = gaussian_attention_weights(x[..., part], features.offset[head], features.log_width[head].exp(), 1)
        torch.testing.assert_close(weights[..., part], one)
    other_way = GaussianAdaptiveAttention(4, 2, dim=-1, head_dim_axis=1).double()
    torch.testing.assert_close(other_way.weights(x).sum(2), torch.ones(2, 12, dtype=D))


def test_weights_always_sum_to_one_in_the_softmax_form():
    x, width = torch.randn(4, 128, 8), torch.full((32,), 2.0)
    ours = gaussian_attention_weights(x, torch.zeros(32), width, 1)
    torch.testing.assert_close(ours.sum(1), torch.ones(4, 8))
    released = gaussian_attention_weights(x, torch.zeros(32), width, 1, official_clamp=True)
    assert released.sum(1).max() < 0.9


def test_eps_counts():
    """The released module passes eps to the wrong place; here it is what the variance gets."""
    x = torch.tensor([[0.0, 1.0, 3.0]], dtype=D)
    wide = GaussianAdaptiveAttention(1, width_init=1.0, eps=1e6).double().weights(x)
    torch.testing.assert_close(wide, torch.full_like(wide, 1 / 3), atol=1e-5, rtol=0)


def test_rescale_keeps_the_size():
    x = torch.randn(2, 10, 6)
    for options in ({"dim": 1}, {"dim": 1, "head_dim_axis": -1}, {"dim": -1}):
        module = GaussianAdaptiveAttention(2, width_init=1e4, rescale=True, **options)
        torch.testing.assert_close(module(x), x, atol=1e-4, rtol=1e-4)
    mask = torch.arange(10)[None] < torch.tensor([[10], [4]])
    module = GaussianAdaptiveAttention(2, dim=1, head_dim_axis=-1, width_init=1e4, rescale=True)
    torch.testing.assert_close(module(x, mask)[1, :4], x[1, :4], atol=1e-4, rtol=1e-4)
    uneven = GaussianAdaptiveAttention(4, dim=1, width_init=1e4, rescale=True)
    torch.testing.assert_close(uneven(x), x, atol=1e-4, rtol=1e-4)


def test_one_value_weighs_one():
    x = torch.randn(2, 1, 4, requires_grad=True)
    out = GaussianAdaptiveAttention(1, dim=1, num_gaussians=2)(x)
    torch.testing.assert_close(out, x)
    out.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_importance_factors():
    weights = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[2.0, 2.0], [2.0, 2.0]]])
    expected = torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(importance_factor(weights), expected)


def test_its_heads_can_be_ablated():
    module, x = GaussianAdaptiveAttention(4, dim=1, head_dim_axis=-1), torch.randn(2, 6, 8)
    plain = module(x)
    with hw.steer(module, Ablate(heads="0.1", mode="zero")):
        out = module(x)
    assert not out[..., 2:4].any() and torch.equal(out[..., 4:], plain[..., 4:])


def test_the_starts():
    torch.manual_seed(0)
    github = GaussianAdaptiveAttention(1, 4000).log_width
    pypi = GaussianAdaptiveAttention(1, 4000, width_init="pypi").log_width.exp()
    assert abs(github.mean()) < 0.1 and 0.9 < github.std() < 1.1
    assert 0.7 < pypi.mean() < 0.9  # half-normal: 0.798
    assert not GaussianAdaptiveAttention(2, 3).offset.any()


@pytest.mark.slow
def test_it_compiles_whole():
    for options in ({"dim": 1}, {"dim": 1, "head_dim_axis": -1, "combine": "sum"}):
        module, x = GaussianAdaptiveAttention(2, 3, **options), torch.randn(2, 9, 8)
        assert_compiles(module, x, fullgraph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads 0, num_gaussians 1"),
        ({"num_heads": 1, "num_gaussians": 0}, "num_gaussians 0"),
        ({"num_heads": 1, "padding_value": math.nan}, "padding_value is NaN"),
        ({"num_heads": 1, "width_init": 0.0}, r"width_init 0\.0; a width is above 0"),
        ({"num_heads": 1, "width_init": "xavier"}, "width_init 'xavier'"),
        ({"num_heads": 1, "combine": "mean"}, "combine 'mean'"),
        ({"num_heads": 1, "offset_units": "metres"}, "offset_units 'metres'"),
    ],
)
def test_refused_modules(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianAdaptiveAttention(**options)


def test_refused_inputs():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"dim 3 is out of range for x of shape \(2, 3, 4\)"):
        GaussianAdaptiveAttention(1, dim=3)(x)
    with pytest.raises(ValueError, match=r"num_heads 5 for 4 places of axis 2"):
        GaussianAdaptiveAttention(5)(x)
    with pytest.raises(ValueError, match="expected two axes or more"):
        GaussianAdaptiveAttention(1)(x[0, 0])
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 4\)"):
        GaussianAdaptiveAttention(1)(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the released code's product"):
        gaussian_attention_weights(x, torch.zeros(1), torch.ones(1), combine="sum", official_clamp=True)
    with pytest.raises(ValueError, match=r"expected \[k\]"):
        gaussian_attention_weights(x, torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="dim -4 is out of range"):
        gaussian_attention_weights(x, torch.zeros(1), torch.ones(1), -4)
    with pytest.raises(ValueError, match="num_heads has 1 numbers for num_layers 2"):
        GaussianAdaptiveBlock(2, [3])


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"x is torch\.int64; expected floating point"):
        gaussian_attention_weights.__wrapped__(torch.ones(2, 3, dtype=torch.long), torch.zeros(1), torch.ones(1))


def test_refused_parameters():
    module = GaussianAdaptiveAttention(2, 2)
    state = {f"attention_heads.{head}.{name}": torch.ones(2) for head in range(2) for name in ("mean_offsets", "c")}
    load_official_state_dict(module, state)
    with pytest.raises(ValueError, match=r"'attention_heads\.1\.c' is in one of state and module only"):
        load_official_state_dict(module, {name: one for name, one in state.items() if name != "attention_heads.1.c"})
    with pytest.raises(ValueError, match="has a width of 0"):
        load_official_state_dict(module, state | {"attention_heads.0.c": torch.tensor([1.0, 0.0])})
    with pytest.raises(ValueError, match="has 3 Gaussians, expected 2"):
        load_official_state_dict(module, state | {"attention_heads.0.c": torch.ones(3)})
