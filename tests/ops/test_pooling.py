"""Windows of tokens: torch's where nothing is masked, and those of the real tokens alone where something is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.ops.pooling import pool_grid, pool_sequence


@given(length=st.integers(1, 12), windows=st.integers(1, 9), before=st.integers(0, 4), after=st.integers(0, 4))
def test_a_masked_sequence_is_pooled_as_the_real_one(length, windows, before, after):
    x = torch.randn(1, before + length + after, 3, dtype=torch.float64)
    mask = torch.zeros(1, x.shape[1], dtype=torch.bool)
    mask[:, before : before + length] = True
    pooled, present = pool_sequence(x, windows, mask)
    wanted, _ = pool_sequence(x[:, before : before + length], windows)
    torch.testing.assert_close(pooled, wanted)
    assert present is not None and present.all()


def test_windows_of_a_sequence_are_means():
    x = torch.arange(5.0)[None, :, None]
    assert pool_sequence(x, 2)[0].flatten().tolist() == [1.0, 3.0]  # 0..2 and 2..4
    nothing, present = pool_sequence(x, 2, torch.zeros(1, 5, dtype=torch.bool))
    assert present is not None and not nothing.any() and not present.any()


def test_windows_of_a_grid():
    x = torch.arange(12.0)[None, :, None]
    assert pool_grid(x, (3, 4), (1, 2))[0].flatten().tolist() == [4.5, 6.5]
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, [0, 1, 4, 5, 8]] = False
    pooled, present = pool_grid(x, (3, 4), (1, 2), mask)
    assert pooled.flatten().tolist() == [9.0, 6.5] and present is not None and present.all()
    mask[0, 9] = False
    pooled, present = pool_grid(x, (3, 4), (1, 2), mask)
    assert pooled.flatten().tolist() == [0.0, 6.5] and present is not None and present.tolist() == [[False, True]]
    with pytest.raises(ValueError, match="12 tokens do not fill a grid of 3 x 3"):
        pool_grid(x, (3, 3), (1, 1))
