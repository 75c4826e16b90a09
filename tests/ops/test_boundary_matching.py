"""The sampling weights of every segment, against the points written out one by one."""

import math

import pytest
import torch

from headwise.ops.boundary_matching import boundary_pairs, boundary_samples, sample_pairs


def points_of(i: int, j: int, bins: int, points: int, ratio: float) -> list[float]:
    low, high = i, j + 1
    margin = (high - low + 1) * ratio
    first, last, count = low - margin, high + margin, bins * points
    return [first + n * ((last - first) / (count - 1)) for n in range(count)]


def by_hand(steps: int, bins: int, points: int, ratio: float) -> torch.Tensor:
    """`[t bins i j]` in float64; a point reads its lower and upper step, both found by truncation towards zero."""
    found = torch.zeros(steps, bins, steps, steps, dtype=torch.float64)
    for i in range(steps):
        for j in range(i, steps):
            for n, place in enumerate(points_of(i, j, bins, points, ratio)):
                share, down = math.modf(place)
                for step, weight in ((int(down), 1 - share), (math.ceil(place), share)):
                    if 0 <= step < steps:
                        found[step, n // points, i, j] += weight / points
    return found


@pytest.mark.parametrize(
    ("steps", "bins", "points", "ratio"), [(7, 5, 3, 0.5), (2, 1, 2, 0.5), (9, 4, 1, 0.0), (6, 3, 2, 2)]
)
def test_equals_the_points_one_by_one(steps, bins, points, ratio):
    expected = by_hand(steps, bins, points, ratio)
    i, j = boundary_pairs(steps)
    weights = boundary_samples(steps, bins, points, float(ratio)).to_dense().view(-1, bins, steps)
    torch.testing.assert_close(weights, expected[:, :, i, j].permute(2, 1, 0).float(), atol=1e-6, rtol=1e-6)


def test_a_constant_is_read_as_the_share_of_points_inside():
    """Points in (-1, 0) count in full and those in (t - 1, t) in part, as in the official code."""
    steps, bins, points = 8, 6, 3
    i, j = boundary_pairs(steps)
    read = boundary_samples(steps, bins, points).to_dense().view(-1, bins, steps).sum(-1)
    for pair, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        places = points_of(a, b, bins, points, 0.5)
        for n in range(bins):
            inside = [1.0 if -1 < x <= steps - 1 else steps - x if steps - 1 < x < steps else 0.0 for x in places]
            assert float(read[pair, n]) == pytest.approx(sum(inside[n * points : (n + 1) * points]) / points, abs=1e-6)


def test_it_stays_sparse():
    weights = boundary_samples(100)
    assert weights.shape == (5050, 3200) and weights.values().numel() == 479_238
    assert abs(weights.values().numel() / (100 * 32 * 100 * 100) - 0.0150) < 1e-4


def test_sampling_is_a_matrix_product_with_a_gradient():
    weights = boundary_samples(6, 4, 2)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    dense = weights.to_dense().double().view(-1, 4, 6)
    torch.testing.assert_close(sample_pairs(x, weights), torch.einsum("pnt,bcnt->bcp", dense, x))
    assert torch.autograd.gradcheck(lambda given: sample_pairs(given, weights), x)


def test_pairs_are_the_upper_triangle():
    i, j = boundary_pairs(3)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 4, "bins": 0}, {"steps": 4, "bins": 1, "points": 1}])
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="at least 2 steps"):
        boundary_samples(**options)
