"""The run of neighborhood-attention: its kernels are what they are said to be, and each row can hold and fail."""

import random

import pytest
import torch

from headwise.attention.neighborhood import _window_index, axes_of, neighborhood_attention
from headwise.papers import _neighborhood_rows as rows
from headwise.papers import _neighborhood_setup as setup
from headwise.papers.record import find_paper
from headwise.papers.running import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(find_paper("neighborhood-attention"), 0, "cpu", tmp_path, say=lambda text: None)


def timed(rank: int, dtype: str, *, unfused: float = 1.0, fused: float = 0.5, held: int = 10, naive: float = 20.0):
    one = setup.Timed(rank, (64,) * rank, 4, dtype)
    one.seconds = {
        "gathered products": naive, "gathered sums": naive + 1, "unfused": unfused, "fused": fused,
        "self attention": 2.0, "matrix product": 0.1,
    }  # fmt: skip
    weights = one.pairs * setup.HEADS * (4 if dtype == "float32" else 2)
    one.held = {"gathered products": 40 * weights, "gathered sums": 40 * weights, "unfused": 2 * weights, "fused": held}
    return one


def table(**changes) -> list[setup.Timed]:
    """float32 and bfloat16 in 1-D and 2-D; bfloat16 makes the fused kernels twice as fast and the unfused not."""
    fast = {"fused": changes.get("fused", 0.5) / 2}
    return [
        timed(r, d, **{**changes, **(fast if d == "bfloat16" else {})}) for r in (1, 2) for d in ("float32", "bfloat16")
    ]


@pytest.mark.parametrize("rank", [1, 2])
def test_all_kernels_agree(rank):
    grid, kernel = ((50,), 8) if rank == 1 else ((9, 11), 5)
    q, k, v = setup.inputs(grid, 0, torch.float64, 2, 8)
    axes = axes_of(grid, kernel)
    index = _window_index(axes, q.device)
    expected = neighborhood_attention(q, k, v, kernel, layout="heads_first", backend="reference")
    for attend in (setup.gather_products(index), setup.gather_sums(index), setup.unfused(axes), setup.fused(axes)):
        torch.testing.assert_close(attend(q, k, v), expected)


def test_bytes_held_are_counted():
    x = torch.zeros(1000)

    def kernel(q, k, v):
        big = q.repeat(10)  # 40,000 bytes, gone before the end
        small = big[:500].clone()
        del big
        return small[:100] + k[:100] + v[:100]

    with setup.Held() as counted:
        kernel(x, x, x)
    assert counted.most == 42_000
    assert setup.held(lambda q, k, v: q.clone(), x, x, x) == 0


def test_improvements():
    one = timed(1, "float32")
    assert one.naive == 20 and one.improvement("unfused") == 1900 and one.improvement("fused") == 3900
    assert rows.full_precision(table()).holds
    assert not rows.full_precision(table(naive=9.0)).holds, "800 % in 1-D are too few"


def test_half_precision_holds_and_fails():
    assert rows.half_precision(table()).holds
    for change in ({"unfused": 5.0}, {"fused": 3.0}, {"unfused": 0.1}):
        assert not rows.half_precision(table(**change)).holds


def test_inefficiencies_and_how_they_fail():
    assert rows.inefficiencies(table()).holds and rows.circumvent(table()).holds
    assert not rows.inefficiencies(table(held=10**9)).holds
    slow = [timed(r, d) for r in (1, 2) for d in ("float32", "bfloat16")]  # neither gains from bfloat16
    assert not rows.inefficiencies(slow).holds
    assert not rows.circumvent(table(fused=1.5)).holds and not rows.circumvent(table(held=10**9)).holds


def test_identities_hold(run):
    for row in (rows.spectrum(run), rows.batched_gemm(run), rows.fused(run)):
        assert row.holds, row.measured
    assert rows.nearest(run, table()).holds and not rows.nearest(run, table(fused=2.5)).holds


def test_rules_of_axes_are_drawn_apart():
    draw = random.Random(0)
    for rank in (1, 2, 3):
        for axes in (setup.random_axes(rank, draw) for _ in range(30)):
            assert len(axes) == rank and (rank == 1 or axes[0] != axes[1])
            axes_of([axis.length for axis in axes], **setup.rules(axes))
