"""Series: what is changed where."""

import pytest
import torch

from headwise.tasks.series import burst_series, contaminated_series


def test_outliers_are_a_fifth_of_the_cells_with_one_sign_a_channel():
    data, clean = contaminated_series(50, seed=1), contaminated_series(50, seed=1, shift=0.0)
    assert 0.18 < data.changed.float().mean() < 0.22 and data.changed.sum(1).float().std() > 2
    moved = data.values - clean.values
    assert torch.equal(moved.abs().round() == 6, data.changed)
    signs = moved.sum(1).sign()
    assert ((moved.sign() == signs[:, None]) | ~data.changed).all() and {-1, 1} == set(signs.flatten().int().tolist())


def test_classes_have_their_levels_whatever_the_seed():
    means = [
        torch.stack([d.values[d.labels == k].mean((0, 1)) for k in range(4)])
        for d in (contaminated_series(4000, share=0.0, seed=s, template_seed=3) for s in (0, 1))
    ]
    torch.testing.assert_close(means[0], means[1], atol=0.03, rtol=0)
    other = contaminated_series(4000, share=0.0, template_seed=4)
    assert (other.values[other.labels == 0].mean((0, 1)) - means[0][0]).abs().max() > 0.1


def test_bursts_lie_in_the_channel_of_the_label():
    data = burst_series(40, seed=2)
    assert torch.equal(data.changed.any(1).int().argmax(1), data.labels) and (data.changed.sum((1, 2)) == 3).all()
    plain = burst_series(40, height=0.0, seed=2)
    torch.testing.assert_close(data.values - plain.values, 3.5 * data.changed, atol=1e-6, rtol=0)


def test_refusals():
    with pytest.raises(ValueError, match=r"share\s+1\.2"):
        contaminated_series(3, share=1.2)
    with pytest.raises(ValueError, match="bursts 65"):
        burst_series(3, bursts=65)
