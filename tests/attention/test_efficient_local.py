"""Efficient local attention: its gates, its sizes, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.compiling import assert_compiles
from torch import nn

from headwise.attention import ELA, EfficientLocalAttention, gate_axes, strip_gate, strip_means

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_ela.safetensors"
VERSIONS = ("T", "B", "S", "L")


def by_loops(module: EfficientLocalAttention, x: torch.Tensor) -> torch.Tensor:
    """The equations, one number at a time (float64, batch, channel, position)."""
    b, c, _, _ = x.shape
    kernel, reach = module.conv.weight, module.conv.weight.shape[2] // 2
    together, block = kernel.shape[1], c // module.norm_groups

    def gate(strip: torch.Tensor) -> torch.Tensor:
        n = strip.shape[2]
        mixed = torch.zeros_like(strip)
        for item in range(b):
            for out in range(c):
                first = out // together * together
                for place in range(n):
                    for tap in range(2 * reach + 1):
                        at = place + tap - reach
                        if 0 <= at < n:
                            for inside in range(together):
                                mixed[item, out, place] += kernel[out, inside, tap] * strip[item, first + inside, at]
            for group in range(module.norm_groups):
                part = slice(group * block, (group + 1) * block)
                values = mixed[item, part]
                mixed[item, part] = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
        return torch.sigmoid(mixed * module.norm.weight[:, None] + module.norm.bias[:, None])

    rows, columns = gate(x.sum(3) / x.shape[3]), gate(x.sum(2) / x.shape[2])
    return torch.einsum("bchw,bch,bcw->bchw", x, rows, columns)


def example(version: str = "B", channels: int = 32, **options) -> EfficientLocalAttention:
    torch.manual_seed(0)
    module = EfficientLocalAttention(channels, version, **options)
    with torch.no_grad():
        for norm in filter(None, (module.norm, module.norm_w)):
            norm.weight.normal_()
            norm.bias.normal_()
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_equations(version):
    module = example(version).double()
    x = torch.randn(2, 32, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_loops(module, x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("version", "each"), [("T", 7), ("B", 9), ("S", 42), ("L", 58)])
def test_parameters(version, each):
    for channels in (32, 64, 512):
        assert sum(p.numel() for p in EfficientLocalAttention(channels, version).parameters()) == each * channels
    assert sum(p.numel() for p in ELA(64, version, shared=False).parameters()) == 2 * each * 64


def test_eight_channels_a_group_and_not_eight_groups():
    assert EfficientLocalAttention(64, "S").conv.groups == 8 and EfficientLocalAttention(256, "L").conv.groups == 32


def test_gates_only_shrink():
    module, x = example(), torch.randn(3, 32, 6, 11)
    out, (rows, columns) = module(x, return_gates=True)
    assert rows.shape == (3, 32, 6) and columns.shape == (3, 32, 11)
    assert all(gate.min() > 0 and gate.max() < 1 for gate in (rows, columns))
    assert (out.abs() <= x.abs()).all() and torch.equal(out.sign(), x.sign())


@pytest.mark.parametrize("version", VERSIONS)
def test_both_axes_are_alike_when_shared(version):
    module, x = example(version), torch.randn(2, 32, 7, 12)
    torch.testing.assert_close(module(x.mT), module(x).mT, atol=1e-6, rtol=1e-6)
    other = example(version, shared=False)
    assert not torch.allclose(other(x.mT), other(x).mT, atol=1e-3)


def test_statistics_are_of_one_strip():
    """Not one norm over both strips, as coordinate attention has it: another height leaves the columns' gate alone."""
    module, x = example(), torch.randn(1, 32, 6, 9)
    taller = torch.cat([x, x * 1.0], 2)  # the same means over the height
    torch.testing.assert_close(module.gates(taller)[1], module.gates(x)[1])


def test_an_image_does_not_see_its_batch_in_training():
    module, x = example().train(), torch.randn(4, 32, 5, 9)
    torch.testing.assert_close(module(x[2:3]), module(x)[2:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(module(x), copy.deepcopy(module).eval()(x), atol=0, rtol=0)


def test_gates_that_start_even():
    module, x = EfficientLocalAttention(32), torch.randn(2, 32, 4, 4)
    nn.init.zeros_(module.norm.weight)
    nn.init.zeros_(module.norm.bias)
    assert torch.equal(module(x), x / 4)
    opened = EfficientLocalAttention(32, identity_init=True, shared=False)
    torch.testing.assert_close(opened(x), x * torch.tensor(4.0).sigmoid() ** 2)


def test_a_fresh_module_divides_by_about_four():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 14, 14)
    assert 0.2 < (EfficientLocalAttention(64)(x).mean((0, 1)) / x.mean((0, 1))).median() < 0.32


def test_a_constant_is_removed_inside_and_not_at_the_ends():
    module, x = EfficientLocalAttention(16, "T", norm_groups=1), torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        module.conv.weight.copy_(torch.full_like(module.conv.weight, 0.2))
    rows = [strip_means(shifted)[0] for shifted in (x, x + 3)]
    mixed = [nn.functional.conv1d(strip, module.conv.weight, padding=2, groups=16) for strip in rows]
    difference = mixed[1] - mixed[0]
    torch.testing.assert_close(difference[..., 2:-2], torch.full_like(difference[..., 2:-2], 3.0))
    assert (difference[..., 0] < 2).all()


def test_as_many_norm_groups_as_channels_leave_positions_only():
    """Each channel alone: its gate does not change when the channel is scaled."""
    module, x = EfficientLocalAttention(16), torch.randn(2, 16, 8, 8) * 3
    scale = torch.linspace(1, 5, 16)[:, None, None]
    torch.testing.assert_close(module.gates(x * scale)[0], module.gates(x)[0], atol=2e-3, rtol=0)
    fewer = EfficientLocalAttention(16, norm_groups=4)
    assert not torch.allclose(fewer.gates(x * scale)[0], fewer.gates(x)[0], atol=2e-2)


def test_memory_formats_and_gradients_agree():
    module, x = example(), torch.randn(2, 32, 6, 10)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(module(last), module(x))
    with torch.no_grad():
        quick = module(x)
        before = x.clone()
    torch.testing.assert_close(quick, module(x))
    assert torch.equal(x, before)
    small = example("T", 32, norm_groups=2).double()
    assert torch.autograd.gradcheck(small, torch.randn(1, 32, 2, 3, dtype=torch.float64, requires_grad=True))


def test_low_precision():
    module, x = example(), torch.randn(2, 32, 9, 9)
    low = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x)
    torch.testing.assert_close(mixed, module(x), atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_it_compiles_whole():
    module, x = example(), torch.randn(2, 32, 9, 9)
    assert_compiles(module, x, fullgraph=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_timm_has_another_function_of_this_name(dtype):
    with safe_open(FIXTURE, "pt") as peer:
        names = [name for name in peer.keys() if name.startswith(dtype)]  # noqa: SIM118
        given = {name.removeprefix(f"{dtype}."): peer.get_tensor(name) for name in names}
    module = EfficientLocalAttention(32, variant="timm").to(given["x"].dtype)
    assert module.conv_w is not None and module.norm_w is not None
    with torch.no_grad():
        module.conv.weight.copy_(given["conv_h.weight"][..., 0])
        module.conv_w.weight.copy_(given["conv_w.weight"][:, :, 0])
        for norm, axis in ((module.norm, "h"), (module.norm_w, "w")):
            norm.weight.copy_(given[f"norm_{axis}.weight"])
            norm.bias.copy_(given[f"norm_{axis}.bias"])
        bound = 1e-6 if dtype == "float32" else 1e-14
        torch.testing.assert_close(module(given["x"]), given["y"], atol=bound, rtol=bound)
        module.variant = "paper"
        assert not torch.allclose(module(given["x"]), given["y"], atol=1e-2)


def test_the_functions_make_the_module():
    module, x = example(), torch.randn(2, 32, 5, 7)
    rows, columns = (
        strip_gate(z, module.conv.weight, module.norm.weight, module.norm.bias, norm_groups=16) for z in strip_means(x)
    )
    torch.testing.assert_close(gate_axes(x, rows, columns), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 24, "version": "T"}, r"norm_groups 32 does not divide 24 channels.*norm_groups=8"),
        ({"channels": 144, "version": "T"}, r"norm_groups=16"),
        ({"channels": 24}, r"norm_groups=8"),
        ({"channels": 32, "kernel_size": 4}, "kernel_size 4; expected"),
        ({"channels": 4, "version": "S"}, "4 channels in 0 conv_groups"),
        ({"channels": 20, "version": "L"}, "20 channels in 2 conv_groups"),
        ({"channels": 32, "conv_groups": 5}, "conv_groups that divide 32"),
        ({"channels": 0}, "channels 0"),
        ({"channels": 32, "version": "M"}, "version 'M'; choose T, B, S or L"),
        ({"channels": 32, "variant": "public"}, "variant 'public'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientLocalAttention(**arguments)


def test_other_inputs_are_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 32, 5\); expected \[batch, 32, height, width\]"):
        EfficientLocalAttention(32)(torch.randn(2, 32, 5))
    with pytest.raises(ValueError, match="expected"):
        EfficientLocalAttention(32)(torch.randn(2, 16, 5, 5))


def test_timm_can_make_it():
    """As `attn_layer(channels)` of its ResNets and `se_layer(channels, act_layer=..., device=..., dtype=...)`."""
    assert ELA is EfficientLocalAttention
    assert ELA(64, act_layer=nn.ReLU, device=None, dtype=torch.float64).conv.weight.dtype == torch.float64
