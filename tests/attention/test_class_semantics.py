"""Class semantics-based attention: its identities, padding, options, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from headwise.attention.class_semantics import ClassSemanticsAttention, SqueezeExcitation, pool_over_time

FIXTURE = Path(__file__).parents[1] / "fixtures" / "squeeze_excite.safetensors"


def module(**options) -> Any:
    return ClassSemanticsAttention(6, 16, **{"reduction": 2, **options})


def inputs(steps: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 16, steps, generator=generator), torch.randn(3, 6, steps, generator=generator)


def by_hand(csa, features, semantics):
    """The equations, one video, channel and step at a time."""
    out = torch.zeros_like(features)
    w = {name: value.detach() for name, value in csa.named_parameters()}
    for b in range(len(features)):
        mean = [float(semantics[b, r].mean()) for r in range(6)]
        hidden = [
            max(
                0.0, sum(float(w["channel.0.weight"][i, r]) * mean[r] for r in range(6)) + float(w["channel.0.bias"][i])
            )
            for i in range(8)
        ]
        for c in range(16):
            s = sum(float(w["channel.2.weight"][c, i]) * hidden[i] for i in range(8)) + float(w["channel.2.bias"][c])
            gate = 1 / (1 + 2.718281828459045**-s)
            for t in range(features.shape[2]):
                z = float(w["time.bias"][c])
                for r in range(6):
                    for k in range(3):
                        if 0 <= t + k - 1 < features.shape[2]:
                            z += float(w["time.weight"][c, r, k]) * float(semantics[b, r, t + k - 1])
                at = 1 / (1 + 2.718281828459045**-z)
                out[b, c, t] = (gate + at) * features[b, c, t]
    return out


def test_equals_the_equations():
    csa, (features, semantics) = module(), inputs(5)
    torch.testing.assert_close(
        csa(features, semantics).detach(), by_hand(csa, features, semantics), atol=1e-5, rtol=1e-5
    )


def test_at_rest_it_changes_nothing():
    csa, (features, semantics) = module(), inputs()
    with torch.no_grad():
        for layer in (csa.channel[2], csa.time):
            layer.weight.zero_()
            layer.bias.zero_()
    assert torch.equal(csa(features, semantics), features)
    halved = module(fuse="mean")
    halved.load_state_dict(csa.state_dict())
    torch.testing.assert_close(halved(features, semantics), features / 2)


def test_squeeze_and_excitation_is_timms():
    """The weights, inputs and outputs of timm's SqueezeExcite on a map of one column."""
    fixture = load_file(FIXTURE)
    state = {
        "channel.0.weight": fixture["fc1.weight"].flatten(1),
        "channel.0.bias": fixture["fc1.bias"],
        "channel.2.weight": fixture["fc2.weight"].flatten(1),
        "channel.2.bias": fixture["fc2.bias"],
    }
    x, expected = fixture["x"].squeeze(-1), fixture["out"].squeeze(-1)
    for made in (SqueezeExcitation(16, hidden_dim=4), module(branches=("channel",), source="features", hidden_dim=4)):
        made.load_state_dict(state)
        torch.testing.assert_close(made(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "mean+std", "max"])
@pytest.mark.parametrize("fuse", ["sum", "mean", "concat1x1"])
def test_padding_changes_no_real_step(pool, fuse):
    csa, (features, semantics) = module(temporal_pool=pool, fuse=fuse), inputs()
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 7:] = False
    short = csa(features[..., :7], semantics[..., :7])
    for filling in (0.0, 1e4, float("nan")):
        longer = semantics.clone()
        longer[..., 7:] = filling
        torch.testing.assert_close(csa(features, longer, mask)[..., :7], short)
    wild = features.clone()
    wild[..., 7:] = 1e4
    own = module(source="features", temporal_pool=pool, fuse=fuse)
    torch.testing.assert_close(own(wild, None, mask)[..., :7], own(features[..., :7]))
    no_mask = semantics.clone()
    no_mask[..., 7:] = 1e4
    assert not torch.allclose(csa(features, no_mask)[..., :7], short)


def test_statistics_over_time():
    _, x = inputs()
    torch.testing.assert_close(pool_over_time(x), x.mean(-1))
    both = pool_over_time(x, "mean+std")
    torch.testing.assert_close(both, torch.cat([x.mean(-1), x.std(-1, correction=0)], 1))
    assert torch.equal(pool_over_time(x, "max"), x.amax(-1))
    nothing = torch.zeros(3, 11, dtype=torch.bool)
    for how in ("mean", "max"):
        assert not pool_over_time(x, how, nothing).any()
    constant = torch.ones(1, 2, 5, requires_grad=True)
    pool_over_time(constant, "mean+std").sum().backward()
    assert constant.grad is not None and constant.grad.isfinite().all()


def test_the_semantics_decide_and_the_control_does_not_read_them():
    features, semantics = inputs()
    csa, control = module(), module(source="features")
    assert not torch.allclose(csa(features, semantics), csa(features, semantics.flip(0)))
    assert torch.equal(control(features, semantics), control(features))


def test_one_weight_per_step_for_all_channels():
    csa, (features, semantics) = module(time_shared=True, branches=("time",)), inputs()
    assert csa.time.weight.shape == (1, 6, 3)
    out = csa(features, semantics) / features
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_the_channel_branch_is_constant_in_time_and_forgets_order():
    csa, (features, semantics) = module(branches=("channel",)), inputs()
    out = csa(features, semantics)
    torch.testing.assert_close(out / features, (out / features)[..., :1].expand_as(out))
    torch.testing.assert_close(csa(features, semantics.flip(-1)), out)


def test_semantics_of_another_rate():
    features, semantics = inputs()
    with pytest.raises(ValueError, match="semantics have 11 steps and features 22"):
        module()(features.repeat(1, 1, 2), semantics)
    stretched = module(interpolate=True)
    out = stretched(features.repeat(1, 1, 2), semantics)
    plain = nn.functional.interpolate(semantics, 22, mode="linear", align_corners=False)
    torch.testing.assert_close(out, stretched(features.repeat(1, 1, 2), plain))


def test_widths():
    assert module().channel[0].out_features == 8 and module(hidden_dim=3).channel[0].out_features == 3
    assert module(reduction=64).channel[0].out_features == 1
    assert module(temporal_pool="mean+std").channel[0].in_features == 12


def test_gradients_and_low_precision():
    csa, (features, semantics) = module().double(), inputs(4)
    pair = features.double().requires_grad_(), semantics.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, s: csa(f, s), pair)
    low = module().bfloat16()
    out = low(features.bfloat16(), semantics.bfloat16())
    assert out.dtype == torch.bfloat16
    full = low.float()(features, semantics)
    assert (out.float() - full).norm() <= 0.03 * full.norm()
    empty = module()(features[:0], semantics[:0])
    assert empty.shape == (0, 16, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel_size": 2}, "kernel_size is 2"),
        ({"branches": ()}, "branches is"),
        ({"branches": ("space",)}, "branches is"),
        ({"groups": 4}, "groups 4 does not divide 6"),
        ({"reduction": 0}, "hidden_dim None"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        module(**options)


def test_inputs_that_do_not_fit_are_refused():
    features, _ = inputs()
    with pytest.raises(ValueError, match="semantics are missing"):
        module()(features)
    with pytest.raises(ValueError, match="expected 6 and 16"):
        module()(features, features)
