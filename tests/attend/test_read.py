"""Whole rows as probes get them: against softmax of scores, for slices and samples of rows, under every mask."""

import pytest
import torch

from headwise.attend.call import Call
from headwise.attend.read import Reading, sample_rows

T = 300
WINDOW = torch.ones(T, T, dtype=torch.bool).tril().triu(-50)[None, None]
PADDING = torch.ones(2, 1, 1, T, dtype=torch.bool)
PADDING[1, ..., :40] = False
MASKS = {
    "causal": {"causal": True},
    "causal, padding": {"causal": True, "mask": PADDING},
    "window": {"mask": WINDOW},
    "bias": {"mask": torch.where(WINDOW, torch.arange(T) / T, -torch.inf)},
    "none": {},
}
ROWS = {"slice": slice(100, 163), "sample": sample_rows(T, 37)}


def call(dtype: torch.dtype, **options) -> Call:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 16, generator=generator, dtype=dtype) for n in (4, 2, 2))
    return Call(3 * q, k, v, scale=0.25, **options)


@pytest.mark.parametrize("gradients", [False, True], ids=["fast", "with gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mask", MASKS)
def test_log_weights_are_those_of_softmax(mask: str, rows: str, dtype: torch.dtype, gradients: bool):
    one = call(dtype, **MASKS[mask])
    with torch.set_grad_enabled(gradients):
        logs = one.log_weights(ROWS[rows], T)
    expected = one.scores(ROWS[rows], T).softmax(-1).nan_to_num(0)
    assert logs.dtype == dtype
    assert torch.isfinite(logs).all()
    torch.testing.assert_close(logs.exp(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("chosen", [None, sample_rows(T, 37)], ids=["all", "sample"])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_cover_the_rows_in_memory_of_their_own_or_shared(mask: str, chosen, monkeypatch):
    monkeypatch.setattr("headwise.attend.read.BLOCK_BYTES", 2**17)
    one = call(torch.float64, **MASKS[mask])
    rows = slice(None) if chosen is None else chosen
    expected = one.scores(rows, T).softmax(-1).nan_to_num(0)
    own = list(Reading(one).blocks(chosen))
    with torch.no_grad():
        shared = [block.weights.clone() for block in Reading(one).blocks(chosen, overwrite=True)]
    assert len(own) > 1
    assert [block.start for block in own] == [0, *torch.tensor([b.weights.shape[2] for b in own]).cumsum(0)[:-1]]
    for block, copy in zip(own, shared, strict=True):  # blocks of their own stay as they were
        r, s = block.weights.shape[2:]
        part = expected[:, :, block.start : block.start + r]
        torch.testing.assert_close(block.weights, part[..., :s], rtol=0, atol=1e-12)
        torch.testing.assert_close(copy, part[..., :s], rtol=0, atol=1e-12)
        assert not part[..., s:].any(), "a column was cut that a row sees"
