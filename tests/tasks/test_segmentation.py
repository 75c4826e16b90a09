"""Segmentation scores against scikit-learn and against scenes whose answer is known."""

import math

import pytest
import torch
from sklearn.metrics import adjusted_rand_score, confusion_matrix, jaccard_score, recall_score

from headwise.tasks.scenes import object_scenes
from headwise.tasks.segmentation import adjusted_rand, class_scores, class_table, segmentation_scores


def test_ari_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for classes in (1, 2, 3, 7):
        a, b = torch.randint(0, classes, (2, 200), generator=generator)
        b = torch.where(torch.rand(200, generator=generator) < 0.5, a, b)
        assert adjusted_rand(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    assert math.isnan(adjusted_rand(a[:0], b[:0]))


def test_the_truth_scores_one_under_any_names():
    labels = object_scenes(10, size=32, seed=0).labels
    named = torch.tensor([3, 0, 4, 1, 2])[labels]
    scores = segmentation_scores(labels, named)
    assert (scores.ari, scores.fg_ari, scores.miou, scores.mbo) == (1, 1, 1, 1)
    assert scores.scored == 10 and scores.skipped == 0


def test_matching_is_one_to_one_and_averages_over_objects():
    true = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 2]])
    one = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])  # a segment over both objects
    scores = segmentation_scores(true, one)
    assert scores.miou == pytest.approx((4 / 6 + 0) / 2)  # the other object is left with the background's segment
    assert scores.mbo == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert scores.fg_ari == 0 and scores.segments == 2


def test_a_fixed_partition_earns_foreground_ari_without_looking():
    """The reference row that every report prints: judge by more than foreground ARI."""
    labels = object_scenes(120, size=48, style="plain", background="black", max_objects=3, seed=0).labels
    half = torch.arange(48) >= 24
    quadrants = (2 * half[:, None] + half).expand_as(labels)
    scores = segmentation_scores(labels, quadrants)
    assert 0.5 < scores.fg_ari < 0.75
    assert scores.ari < 0.15 and scores.miou < 0.35


def test_scenes_without_objects_are_counted_and_left_out():
    true = torch.tensor([[0, 0, 0], [0, 1, 1]])
    scores = segmentation_scores(true, true)
    assert (scores.scored, scores.skipped) == (1, 1)
    assert math.isnan(segmentation_scores(true[:1], true[:1]).miou)


@pytest.mark.parametrize(
    ("true", "predicted", "said"),
    [
        (torch.zeros(1, 4).long(), torch.zeros(1, 5).long(), r"\(1, 4\), predicted \(1, 5\)"),
        (torch.zeros(1, 4).long(), torch.full((1, 4), -1), "predicted holds the label -1"),
        (torch.zeros(1, 4), torch.zeros(1, 4).long(), "true is torch.float32"),
    ],
)
def test_other_maps_are_refused(true, predicted, said):
    with pytest.raises((ValueError, TypeError), match=said):
        segmentation_scores(true, predicted)


def test_class_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    true, other = torch.randint(0, 4, (2, 3, 8, 8), generator=generator)
    predicted = torch.where(torch.rand(true.shape, generator=generator) < 0.6, true, other)
    table = torch.stack([class_table(one, two, 4) for one, two in zip(true, predicted, strict=True)]).sum(0)
    flat = true.flatten().numpy(), predicted.flatten().numpy()
    assert table.tolist() == confusion_matrix(*flat).tolist()
    scores = class_scores(table)
    assert scores.iou == pytest.approx(jaccard_score(*flat, average=None))  # pyright: ignore[reportArgumentType]
    assert scores.miou == pytest.approx(jaccard_score(*flat, average="macro"))
    assert scores.mean_accuracy == pytest.approx(recall_score(*flat, average="macro"))
    assert scores.pixel_accuracy == pytest.approx(float((true == predicted).double().mean())) and scores.pixels == 192


def test_pixels_that_do_not_count_and_classes_that_are_nowhere():
    true, predicted = torch.tensor([0, 0, 1, 255]), torch.tensor([0, 1, 1, 2])
    scores = class_scores(class_table(true, predicted, 3))
    assert scores.pixels == 3 and scores.pixel_accuracy == pytest.approx(2 / 3)
    assert scores.iou[:2] == (0.5, 0.5) and math.isnan(scores.iou[2]) and scores.miou == 0.5
    assert math.isnan(class_scores(class_table(true[3:], predicted[3:], 3)).miou)


def test_labels_out_of_range_are_refused():
    maps = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"true holds labels from 0 to 3; expected 0 to 2, or 255"):
        class_table(torch.tensor([0, 3]), maps, 3)
    with pytest.raises(ValueError, match=r"predicted holds labels from -1 to 0"):
        class_table(maps, torch.tensor([0, -1]), 3)
    with pytest.raises(ValueError, match=r"predicted is torch\.float32; expected label maps"):
        class_table(maps, maps.float(), 3)
    with pytest.raises(ValueError, match=r"true is \(2,\), predicted \(1,\)"):
        class_table(maps, maps[:1], 3)
