"""The contract of `memory`: a sequence memory gives the same step by step, in chunks and all at once.

A memory module takes ``x`` `(b t c)` and a ``state`` (None at the start) and returns (out `(b t c)`, state).
"""

import pytest
import torch
from tests.contracts.discovery import exported, make
from torch import nn

MEMORIES = exported("memory", nn.Module)


@pytest.mark.parametrize("cls", MEMORIES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 4, 3], [5, 6]], ids=lambda sizes: f"{sizes[0]} at a time")
def test_pieces_equal_the_whole(cls: type[nn.Module], sizes: list[int]):
    torch.manual_seed(0)
    module, x = make(cls).eval(), torch.randn(2, 11, 32)
    whole, _ = module(x)
    state, pieces = None, []
    for piece in x.split(sizes, dim=1):
        out, state = module(piece, state=state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-3)
