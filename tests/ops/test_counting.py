"""Counts against closed formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headwise.attend.kernels import attention_with_lse
from headwise.ops.counting import flops

B, H, N, T, S, D = 2, 8, 2, 13, 13, 32
ATTENTION = 2 * B * H * T * S * (D + D)


def tensors(grad=False):
    return [torch.zeros(B, heads, T, D, requires_grad=grad) for heads in (H, N, N)]


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_attention(implementation):
    def call(q, k, v):
        return attention_with_lse(q, k, v, causal=True, implementation=implementation)

    assert flops(call, tensors()) == ATTENTION


def test_torch_attention():
    assert flops(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), tensors()) == ATTENTION


def test_attention_with_its_gradient():
    q, k, v = tensors(grad=True)
    assert flops(lambda q, k, v: attention_with_lse(q, k, v)[0].sum().backward(), (q, k, v)) == ATTENTION * 7 // 2
    assert q.grad is None


def test_module_and_keywords():
    layer = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    assert flops(layer, (torch.zeros(5, 16),)) == 2 * 5 * 16 * 64 * 2
    assert flops(layer, {"input": torch.zeros(5, 16)}) == 2 * 5 * 16 * 64 * 2
    assert next(layer.parameters()).device.type == "cpu"


def test_grows_with_length_without_computing():
    layer = nn.Linear(1024, 1024, device="meta")
    assert flops(layer, (torch.zeros(100_000, 1024, device="meta"),)) == 2 * 100_000 * 1024**2
