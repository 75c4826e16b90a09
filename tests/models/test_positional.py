"""The positional transformer and its rivals: forms, sizes, blank node, what routes can compute."""

import pytest
import torch
from torch import nn

from headwise.models import PositionalConfig, PositionalTransformer
from headwise.models.positional import turned
from headwise.papers._positional_setup import by_hand
from headwise.tasks.algorithmic import algorithm

X = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(0))


def model(**options) -> PositionalTransformer:
    torch.manual_seed(0)
    return PositionalTransformer(PositionalConfig(**options)).eval()


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_depth_and_sizes_of_the_official_code():
    net = model()
    assert len(net.blocks) == 4 and [len(model(length=n).blocks) for n in (1, 2, 7, 16)] == [1, 2, 3, 5]
    attention = (9 * 36 + 36) + 2 * (64 * 64 + 64)
    mlp = (128 * 64 + 64) + (64 * 64 + 64)
    assert count(net) == 128 + 4 * (attention + mlp) + 65
    wide = (64 * 256 + 256) + 2 * (64 * 64 + 64)
    assert count(model(attention="standard")) == (10 * 64 + 64) + 4 * (wide + mlp) + 65


def test_there_is_no_residual_and_no_norm():
    net = model()
    assert not any(isinstance(one, nn.LayerNorm | nn.Dropout) for one in net.modules())
    for block in net.blocks:
        nn.init.zeros_(block.mlp[2].weight)
        nn.init.zeros_(block.mlp[2].bias)
    torch.testing.assert_close(net(X).values, net.decode.bias.expand(3, 8, 1))


@pytest.mark.parametrize("kind", ["positional", "standard", "rope"])
def test_the_blank_node_takes_part_and_is_not_returned(kind):
    net = model(attention=kind)
    assert net(X).values.shape == (3, 8, 1)
    encodings = net.encodings(8)
    assert torch.equal(encodings, torch.eye(9)) and torch.equal(net.encodings(3)[-1], torch.eye(9)[-1])
    other = encodings.clone()
    other[-1] = other[-1].flip(0)
    assert not torch.allclose(net(X, other).values, net(X).values)


@pytest.mark.parametrize("kind", ["positional", "standard", "rope"])
def test_padding_changes_nothing(kind):
    net = model(attention=kind)
    padded = torch.cat([X[:, :5], 100 * torch.randn(3, 3, 1)], 1)
    mask = torch.arange(8)[None].expand(3, 8) < 5
    out = net(padded, attention_mask=mask).values[:, :5]
    if kind == "rope":  # the blank node is turned by the place where it stands
        return
    torch.testing.assert_close(out, net(X[:, :5]).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["sum", "min", "max"])
def test_routes_by_hand_compute_prefixes_exactly(task):
    for length in (5, 8, 16):
        net = by_hand(task, length)
        values = 2000 * torch.rand(50, length, dtype=torch.float64) - 1000
        out = net(values[..., None]).values[..., 0]
        torch.testing.assert_close(out, algorithm(task, values), atol=1e-9, rtol=0)


def test_turning_is_by_differences_of_places():
    """Scores of turned vectors depend on the distance of their places alone, and lengths stay."""
    q, k = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned_q, turned_k = (turned(one.expand(12, 64)) for one in (q, k))
    scores = turned_q @ turned_k.mT
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal))
    assert scores.diagonal(1)[0] != scores.diagonal(2)[0]
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(12))


def test_refusals():
    net = model()
    with pytest.raises(ValueError, match="values have width 2, expected 1"):
        net(torch.zeros(1, 8, 2))
    with pytest.raises(ValueError, match="9 tokens and a blank node for pos_dim 9"):
        net(torch.zeros(1, 9, 1))
    with pytest.raises(ValueError, match=r"positions are \(8, 9\); expected \(9, 9\)"):
        net(X, torch.zeros(8, 9))
    with pytest.raises(ValueError, match="attention is 'random'; choose positional"):
        model(attention="random")
    with pytest.raises(ValueError, match="num_heads 5 do not divide hidden_size 64"):
        model(attention="standard", num_heads=5)


def test_weights_are_made_once_for_encodings_of_its_own():
    net, calls = model(), []
    layer = net.blocks[0].attention
    layer.qk.register_forward_hook(lambda *given: calls.append(1))
    with torch.no_grad():
        first = net(X).values
        assert torch.equal(net(X).values, first) and len(calls) == 1
    net(X)
    assert len(calls) == 2
