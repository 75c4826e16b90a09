"""The hardest triplets of a batch, against loops."""

import math

import pytest
import torch

from headwise.ops.triplets import batch_hard_triplet


def by_loop(features, labels, margin):
    losses = []
    for a in range(len(labels)):
        same = [j for j in range(len(labels)) if j != a and labels[j] == labels[a]]
        other = [j for j in range(len(labels)) if labels[j] != labels[a]]
        if same and other:
            far = max(math.dist(features[a], features[j]) for j in same)
            near = min(math.dist(features[a], features[j]) for j in other)
            losses.append(math.log1p(math.exp(far - near)) if margin is None else max(0.0, far - near + margin))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("margin", [0.3, 0.0, None])
def test_equals_the_loops(margin):
    features, labels = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 0])
    found = batch_hard_triplet(features, labels, margin=margin)
    assert float(found) == pytest.approx(by_loop(features.tolist(), labels.tolist(), margin), abs=1e-9)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_a_batch_without_triplets_costs_nothing(labels):
    features = torch.randn(3, 4, requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0 and features.grad is not None and not features.grad.any()


def test_equal_features_have_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad is not None and features.grad.isfinite().all()


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match=r"margin is -1\.0"):
        batch_hard_triplet(torch.randn(2, 2), torch.tensor([0, 1]), margin=-1.0)
