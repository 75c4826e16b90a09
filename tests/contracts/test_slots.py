"""The contract of `slots`: permuting slots permutes what comes out, and the masks of a position sum to one.

A slot module takes features `(b n c)` and initial ``slots`` `(b k c)` and returns slots, or (slots, masks `(b k n)`).
"""

import pytest
import torch
from tests.contracts.discovery import exported, make
from torch import Tensor, nn

SLOTS = exported("slots", nn.Module)


def run(module: nn.Module, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
    out = module(x, slots=slots)
    return out if isinstance(out, tuple) else (out, None)


@pytest.mark.parametrize("cls", SLOTS, ids=lambda cls: cls.__name__)
def test_slots_have_no_order(cls: type[nn.Module]):
    torch.manual_seed(0)
    module, x, slots = make(cls).eval(), torch.randn(2, 17, 32), torch.randn(2, 3, 32)
    order = torch.tensor([2, 0, 1])
    found, masks = run(module, x, slots)
    moved, moved_masks = run(module, x, slots[:, order])
    torch.testing.assert_close(moved, found[:, order], atol=1e-5, rtol=1e-4)
    if masks is not None and moved_masks is not None:
        torch.testing.assert_close(moved_masks, masks[:, order], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(masks.sum(1), torch.ones_like(masks[:, 0]), atol=1e-5, rtol=1e-5)
