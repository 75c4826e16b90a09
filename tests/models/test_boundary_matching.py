"""BMN: the official layers in their official order, its loss, converted checkpoints. Saving is the contract's."""

from typing import Any

import pytest
import torch
from tests.ops.test_boundary_matching import by_hand
from torch import nn

from headwise.models import BoundaryMatchingConfig, BoundaryMatchingNetwork
from headwise.models.boundary_matching import BoundaryMatchingLoss, from_jjboy
from headwise.tasks.temporal_detection import boundary_labels

SIZES: dict[str, Any] = {"feature_dim": 8, "temporal_scale": 9, "hidden_1d": 16, "hidden_2d": 8, "hidden_3d": 12}
SIZES["num_samples"] = 5


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    return BoundaryMatchingNetwork(BoundaryMatchingConfig(**{**SIZES, **options})).eval()


class Official(nn.Module):
    """BMN as the paper and its code order it: dense samples of every pair, then a 3D convolution over them."""

    def __init__(self) -> None:
        super().__init__()

        def head() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv1d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv1d(16, 1, 1), nn.Sigmoid()
            )

        self.x_1d_b = nn.Sequential(
            nn.Conv1d(8, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1, groups=4), nn.ReLU()
        )
        self.x_1d_s, self.x_1d_e = head(), head()
        self.x_1d_p = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU())
        self.x_3d_p = nn.Sequential(nn.Conv3d(16, 12, (5, 1, 1), stride=(5, 1, 1)), nn.ReLU())
        self.x_2d_p = nn.Sequential(
            nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.sample_mask = nn.Parameter(by_hand(9, 5, 3, 0.5).float().view(9, -1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        base = self.x_1d_b(x)
        samples = (self.x_1d_p(base) @ self.sample_mask).reshape(len(x), 16, 5, 9, 9)
        return self.x_2d_p(self.x_3d_p(samples).squeeze(2)), self.x_1d_s(base).squeeze(1), self.x_1d_e(base).squeeze(1)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_converted_weights_give_the_official_outputs(prefix):
    official, ours, x = Official().eval(), network(), torch.randn(3, 8, 9)
    ours.load_state_dict(from_jjboy({prefix + name: value for name, value in official.state_dict().items()}))
    confidence, starts, ends = official(x)
    out = ours(x)
    torch.testing.assert_close(out.confidence, confidence.triu(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.starts, starts)
    torch.testing.assert_close(out.ends, ends)


def test_parameters_of_the_official_network():
    with torch.device("meta"):
        made = BoundaryMatchingNetwork(BoundaryMatchingConfig())
    assert sum(p.numel() for p in made.parameters()) == 4_978_564


def test_gradients_equal_those_of_the_official_order():
    official, ours, x = Official(), network().train(), torch.randn(2, 8, 9)
    ours.load_state_dict(from_jjboy(official.state_dict()))
    upper = torch.ones(9, 9).triu()
    (official(x)[0] * upper).square().sum().backward()
    ours(x).confidence.square().sum().backward()
    torch.testing.assert_close(ours.sample_conv.weight.grad, official.x_3d_p[0].weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.base[0].weight.grad, official.x_1d_b[0].weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", [None, "se", "csa", "csa+se"])
def test_where_attention_sits(attention):
    made, x = network(attention=attention, attention_options={"reduction": 2}), torch.randn(2, 8, 9)
    expected = made.base(x)
    if made.csa is not None:
        expected = made.csa(expected, x)
    if made.se is not None:
        expected = made.se(expected)
    assert (made.csa is not None, made.se is not None) == (
        "csa" in (attention or ""),
        "se" in (attention or "").split("+"),
    )
    torch.testing.assert_close(made.encode(x), expected)
    torch.testing.assert_close(made(x).starts, made.start_head(expected).squeeze(1))


def test_semantics_of_their_own():
    made, x = network(attention="csa", semantic_dim=3), torch.randn(2, 8, 9)
    semantics = torch.randn(2, 3, 9)
    assert not torch.allclose(made(x, semantics).starts, made(x, -semantics).starts)
    with pytest.raises(ValueError, match="expected 3 and 16"):
        made(x)


# Loss


def labels(*videos: list[list[float]]) -> dict[str, torch.Tensor]:
    every = [boundary_labels(torch.tensor(segments).reshape(-1, 2), 9) for segments in videos]
    return {name: torch.stack([one[name] for one in every]) for name in every[0]}


def test_balanced_loss_by_hand():
    given = labels([[0.1, 0.5]], [[0.3, 0.9]])
    starts, ends = torch.rand(2, 9), torch.rand(2, 9)
    confidence = torch.rand(2, 2, 9, 9)
    found = BoundaryMatchingLoss("plain", 0.8)(confidence, starts, ends, given)
    positives = [(b, t) for b in range(2) for t in range(9) if given["starts"][b, t] > 0.5]
    ratio = 18 / len(positives)
    total = 0.0
    for b in range(2):
        for t in range(9):
            p = starts[b, t].double()
            right = (b, t) in positives
            total -= float(
                0.5 * ratio * torch.log(p + 1e-6) if right else 0.5 * ratio / (ratio - 1) * torch.log(1 - p + 1e-6)
            )
    assert float(found["starts"]) == pytest.approx(total / 18, rel=1e-4)
    error = [
        (float(confidence[b, 0, i, j]) - float(given["overlap"][b, i, j])) ** 2
        for b in range(2)
        for i in range(9)
        for j in range(i, 9)
    ]
    assert float(found["overlap"]) == pytest.approx(sum(error) / len(error), rel=1e-4)


def test_lower_triangles_do_not_count():
    given, loss = labels([[0.1, 0.5]]), BoundaryMatchingLoss("plain", 0.8)
    confidence, rest = torch.rand(1, 2, 9, 9), (torch.rand(1, 9), torch.rand(1, 9))
    changed = confidence + torch.ones(9, 9).tril(-1) * 0.1
    one, other = loss(confidence, *rest, given), loss(changed, *rest, given)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sampled_regression():
    given, loss = labels([[0.12, 0.52]]), BoundaryMatchingLoss()
    overlap = given["overlap"]
    shifted = torch.stack([overlap + 0.5, overlap], 1)
    rest = (torch.rand(1, 9), torch.rand(1, 9))
    # Every chosen segment is off by 0.5, however many were chosen: 0.5 * 0.25.
    assert float(loss(shifted, *rest, given)["overlap"]) == pytest.approx(0.125)
    high, middle = (overlap > 0.7).sum(), ((overlap > 0.3) & (overlap <= 0.7)).sum()
    low = ((overlap > 0) & (overlap <= 0.3)).sum()
    assert 0 < high < min(middle, low)
    only_high = torch.stack([overlap + (overlap > 0.7), overlap], 1)  # wrong by 1 where all are chosen
    chosen = [0.5 * float(high) / float(loss(only_high, *rest, given)["overlap"]) for _ in range(400)]
    assert sum(chosen) / 400 == pytest.approx(3 * float(high), rel=0.1), "about as many of each of the three kinds"


@pytest.mark.parametrize("segments", [[], [[0.0, 1.0]]])
def test_batches_with_nothing_to_tell_apart_have_a_finite_loss(segments):
    """The official code divides by zero without positives."""
    made = network(attention="csa").train()
    for positive in (0.9, 0.01):
        made.criterion.positive = positive
        out = made(torch.randn(1, 8, 9), labels=labels(segments))
        assert out.loss.isfinite()
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in made.parameters())
    loss = BoundaryMatchingLoss()
    ones = {name: torch.ones(1, 9) for name in ("starts", "ends")}
    found = loss(
        torch.rand(1, 2, 9, 9), torch.full((1, 9), 0.5), torch.rand(1, 9), {**ones, "overlap": torch.ones(1, 9, 9)}
    )
    assert float(found["starts"]) == pytest.approx(0.6931, abs=1e-3)  # r = 1: the plain mean


def test_the_whole_loss_is_weighted():
    made = network().train()
    out = made(torch.randn(2, 8, 9), labels=labels([[0.1, 0.5]], [[0.3, 0.9]]))
    parts = out.losses
    torch.testing.assert_close(out.loss, parts["starts"] + parts["ends"] + 10 * parts["overlap"] + parts["right"])
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "CSA"}, "'CSA'"),
        ({"feature_dim": 6}, "groups 4 does not divide feature_dim 6"),
        ({"temporal_scale": 1}, "temporal_scale is 1"),
        ({"regression": "l1"}, "'l1'"),
        ({"positive": 1.5}, r"positive 1\.5"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        network(**options)


def test_inputs_and_checkpoints_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 10\), expected \(8, 9\)"):
        network()(torch.randn(1, 8, 10))
    with pytest.raises(ValueError, match=r"x_9d\.weight is no weight"):
        from_jjboy({"x_9d.weight": torch.zeros(1)})
