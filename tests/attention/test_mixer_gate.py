"""The gate made by token mixing: its equation, its limits, what reaches what."""

from typing import Any

import pytest
import torch
from torch import nn

from headwise.attention import MixerGate


def gate(dim: int = 12, tokens: int = 7, **options) -> MixerGate:
    torch.manual_seed(0)
    return MixerGate(dim, tokens, **options).eval().double()


X = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_equation():
    """Written with linear layers on the transpose, as the paper has it."""
    module = gate(token_hidden=5, channel_hidden=9)
    z = module.token_norm(X).transpose(1, 2)
    z = X + module.token_down(nn.functional.gelu(module.token_up(z))).transpose(1, 2)
    z = z + module.channel_down(nn.functional.gelu(module.channel_up(module.channel_norm(z))))
    torch.testing.assert_close(module.mix(X), z, atol=1e-12, rtol=0)
    torch.testing.assert_close(module(X), (X @ module.proj.weight.mT + module.proj.bias) * z, atol=1e-12, rtol=0)


def influence(module: MixerGate) -> torch.Tensor:
    """Derivatives of each output `[n c]` by each input `[n c]` of one item."""
    between: Any = torch.autograd.functional.jacobian(module, X[:1])
    return between[0, :, :, 0]


def test_without_mixing_the_gate_is_the_token_itself():
    module = gate()
    with torch.no_grad():
        for layer in (module.token_down, module.channel_down):
            layer.weight.zero_()
            layer.bias.zero_()
    torch.testing.assert_close(module(X), module.proj(X) * X, atol=0, rtol=0)
    between = influence(module)
    for token in range(7):
        others = torch.arange(7) != token
        assert not between[token][:, others].any() and between[token][:, token].any()


def test_every_token_reaches_every_other():
    between = influence(gate())
    assert (between.norm(dim=(1, 3)) > 0).all()


def test_positions_matter():
    """The mixing weights know where a token stands: no equivariance."""
    module, order = gate(), torch.tensor([3, 0, 1, 6, 5, 2, 4])
    assert not torch.allclose(module(X[:, order]), module(X)[:, order])
    assert not torch.allclose(module(X[:, order]).mean(1), module(X).mean(1))


def test_gates_are_unbounded():
    """No sigmoid: twice the tokens give more than twice the output."""
    module = gate()
    with torch.no_grad():
        module.proj.bias.zero_()
    assert module(100 * X).abs().max() > 1000 * module(X).abs().max()


def test_half_precision_forms_the_product_in_float32():
    module = gate().half()
    with torch.no_grad():
        module.proj.weight.fill_(0.0)
        module.proj.bias.fill_(2.0**-13)
    x = 2000 * X.half()
    wanted = (module.mix(x).double() * 2.0**-13).half()
    torch.testing.assert_close(module(x), wanted, atol=0, rtol=1e-3)


def test_dropout_acts_inside_the_gate_in_training():
    module = gate(dropout=0.5)
    torch.testing.assert_close(module(X), gate()(X))
    module.train()
    assert not torch.allclose(module.mix(X), module.mix(X))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "num_tokens 0"),
        ({"token_hidden": -1}, "token_hidden -1"),
        ({"channel_hidden": 0}, "channel_hidden 0"),
        ({"dropout": 1.0}, r"dropout 1\.0"),
        ({"dropout": -0.1}, r"dropout -0\.1"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        gate(**options)


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="6 tokens; its mixing weights belong to 7 positions"):
        gate()(X[:, :6])
