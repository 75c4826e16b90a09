"""Detectors: targets, loss and peaks against what they are made of."""

import pytest
import torch
from tests.models.test_segmenter import SIZES, UNUSED, without_gradient
from transformers.loss.loss_for_object_detection import generalized_box_iou

from headwise.models import BACKBONES, Detector, DetectorConfig, generalised_iou
from headwise.models.detector import bumps


def made(name: str = "davit", **options) -> Detector:
    torch.manual_seed(0)
    return Detector(DetectorConfig(name, SIZES[name], head_width=8, num_labels=3, **options)).eval()


def test_generalised_iou_is_that_of_transformers():
    low = torch.rand(2, 20, 2)
    one, other = torch.cat([low, low + torch.rand(2, 20, 2)], -1)
    torch.testing.assert_close(generalised_iou(one, other), generalized_box_iou(one, other).diagonal())
    assert generalised_iou(torch.zeros(4), torch.zeros(4)) == 0


def test_a_bump_stands_on_each_centre():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.25], [0.9, 0.9, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]])
    labels = torch.tensor([[2, 0, -1]])
    bump = bumps(labels, boxes, 8, 16)
    assert bump.shape == (1, 3, 8, 16)
    assert bump[0, 0, 1, 4] == 1 and bump[0, 1, 7, 15] == 1 and bump[0, 2].abs().sum() == 0
    assert (bump[0, 0] == 1).sum() == 1
    sigma_x = 0.5 * 16 * 0.54 / 6
    assert bump[0, 0, 1, 6] == pytest.approx(torch.exp(torch.tensor(-2.0 / sigma_x**2)).item())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_learns_a_scene_by_heart(name):
    """The loss falls and the boxes come out where they are."""
    model, images = made(name).train(), torch.rand(1, 3, 16, 16)
    boxes, labels = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.4, 1.0, 0.9]]]), torch.tensor([[1, 2]])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        loss = model(images, labels=labels, boxes=boxes).loss
        optimiser.zero_grad()
        loss.backward()
        assert without_gradient(model) == UNUSED.get(name, set())
        optimiser.step()
    with torch.no_grad():
        out = model(images)
    places, scores, kinds = model.found(out.logits, out.pred_boxes)
    found = {int(kind): place for kind, place in zip(kinds[0, :2], places[0, :2], strict=True)}
    assert set(found) == {1, 2} and scores[0, 1] > scores[0, 2]
    torch.testing.assert_close(torch.stack([found[1], found[2]]), boxes[0], atol=0.1, rtol=0)


def test_peaks_alone_are_found():
    model = made(max_boxes=4)
    logits = torch.full((1, 3, 5, 5), -8.0)
    logits[0, 1, 2, 2], logits[0, 1, 2, 3], logits[0, 0, 4, 0] = 3.0, 2.0, 1.0
    cells = torch.arange(25.0).view(1, 1, 5, 5).expand(1, 4, 5, 5) / 25
    places, scores, kinds = model.found(logits, cells)
    assert places.shape == (1, 4, 4)
    torch.testing.assert_close(scores[0, :2], torch.tensor([3.0, 1.0]).sigmoid())
    assert kinds[0, :2].tolist() == [1, 0] and (places[0, :2, 0] * 25).tolist() == [12.0, 20.0]
    assert (scores[0, 2:] < 0.01).all()  # the cell beside the peak is none


def test_an_image_without_objects_has_a_loss():
    model, images = made(), torch.rand(2, 3, 16, 16)
    labels, boxes = torch.full((2, 3), -1), torch.zeros(2, 3, 4)
    loss = model(images, labels=labels, boxes=boxes).loss
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    with pytest.raises(ValueError, match="labels were given without boxes"):
        model(images, labels=labels)
