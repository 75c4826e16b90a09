"""DiNAT runs without NATTEN, and what it computes is what its paper says: against plain loops over windows."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DinatBackbone, DinatConfig, DinatForImageClassification

from headwise.attention import natten2dav, natten2dqkrpb, neighborhood_attention
from headwise.models import provide_natten

modeling_dinat: Any = importlib.import_module("transformers.models.dinat.modeling_dinat")


def config(**changes) -> DinatConfig:
    sizes = {
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "kernel_size": 3,
        "dilations": [[1, 3], [1, 2]],
        "num_labels": 5,
        "initializer_range": 0.3,
        "drop_path_rate": 0.0,
    }
    return DinatConfig(**{**sizes, **changes})


def window(i: int, length: int, kernel: int, dilation: int) -> list[int]:
    """Neighbours of a position, counted out: of its own residue the nearest `kernel`, moved in at the border."""
    same = list(range(i % dilation, length, dilation))
    at = same.index(i)
    first = min(max(at - kernel // 2, 0), len(same) - kernel)
    return same[first : first + kernel]


def layer_by_loops(layer: Any, x: Tensor) -> Tensor:
    """One attention layer on `[b x y c]`, row by row."""
    heads, size, kernel, dilation = (
        layer.num_attention_heads,
        layer.attention_head_size,
        layer.kernel_size,
        layer.dilation,
    )
    q, k, v = (project(x).unflatten(-1, (heads, size)) for project in (layer.query, layer.key, layer.value))
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            rows, columns = window(i, x.shape[1], kernel, dilation), window(j, x.shape[2], kernel, dilation)
            for h in range(heads):
                scores, values = [], []
                for a in rows:
                    for c in columns:
                        bias = layer.rpb[h, (a - i) // dilation + kernel - 1, (c - j) // dilation + kernel - 1]
                        scores.append((q[:, i, j, h] * k[:, a, c, h]).sum(-1) / size**0.5 + bias)
                        values.append(v[:, a, c, h])
                weights = torch.stack(scores, -1).softmax(-1)
                out[:, i, j, h] = (weights[..., None] * torch.stack(values, 1)).sum(1)
    return out.flatten(-2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    with provide_natten():
        made: Any = DinatForImageClassification(config()).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    return made


PIXELS = torch.randn(2, 3, 36, 44, generator=torch.Generator().manual_seed(0))


def test_every_layer_equals_the_loops(model):
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out[0])))
        for module in model.modules()
        if type(module).__name__ == "NeighborhoodAttention"
    ]
    with torch.no_grad(), provide_natten():
        logits = model(PIXELS).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4 and logits.shape == (2, 5)
    for layer, x, out in seen:
        torch.testing.assert_close(out, layer_by_loops(layer, x), atol=1e-5, rtol=1e-4)


def test_the_two_functions_give_the_same(model):
    with torch.no_grad(), provide_natten():
        fused, weights = model(PIXELS), model(PIXELS, output_attentions=True)
    torch.testing.assert_close(weights.logits, fused.logits, atol=1e-5, rtol=1e-4)
    assert weights.attentions[0].shape[-1] == 9


def test_it_trains(model):
    model.train()
    with provide_natten():
        model(PIXELS, labels=torch.tensor([1, 3])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.endswith("rpb"):
            assert parameter.grad.abs().max() > 0, name


def test_small_images_and_the_backbone():
    torch.manual_seed(0)
    with torch.no_grad(), provide_natten():  # transformers pads maps that are smaller than the window
        maps = DinatBackbone(config(out_features=["stage1", "stage2"])).eval()(torch.randn(1, 3, 24, 24)).feature_maps
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 6, 6), (16, 3, 3)]


def test_nothing_stays_behind():
    before = (modeling_dinat.natten2dav, modeling_dinat.requires_backends, modeling_dinat.NeighborhoodAttention.forward)
    outer = provide_natten()
    with provide_natten():
        assert modeling_dinat.natten2dav is natten2dav
    assert modeling_dinat.natten2dav is natten2dav, "the outer one is still open"
    outer.remove()
    outer.remove()
    after = (modeling_dinat.natten2dav, modeling_dinat.requires_backends, modeling_dinat.NeighborhoodAttention.forward)
    assert before == after
    with pytest.raises(ImportError, match="natten"):
        DinatForImageClassification(config())


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1)])
def test_both_halves_make_the_whole(kernel, dilation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 11, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64)
    weights = natten2dqkrpb(q * 0.5, k, bias, kernel, dilation).softmax(-1)
    whole = neighborhood_attention(
        q, k, v, kernel, dilation=dilation, bias=bias, layout="heads_first", backend="reference"
    )
    assert weights.shape == (2, 3, 7, 11, kernel**2)
    torch.testing.assert_close(natten2dav(weights, v, kernel, dilation), whole, atol=1e-12, rtol=1e-12)
