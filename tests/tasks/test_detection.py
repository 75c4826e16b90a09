"""Average precision: worked by hand, in limits, against COCO's own code and a slow reading of its definition."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwise.tasks.detection import THRESHOLDS, Boxes, box_iou, detection_scores

FIXTURE = Path(__file__).parents[1] / "fixtures" / "coco_ap.safetensors"


def boxes(rows, classes=None, scores=None):
    made = torch.tensor(rows, dtype=torch.float32).view(-1, 4)
    kinds = torch.zeros(len(made), dtype=torch.long) if classes is None else torch.tensor(classes)
    return Boxes(made, kinds, None if scores is None else torch.tensor(scores))


def test_iou_by_hand():
    one = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(box_iou(one, other), torch.tensor([[1 / 7, 0.5, 0.0, 0.0], [0.0] * 4]))


def test_the_truth_scores_one():
    true = [boxes([[0, 0, 4, 4], [5, 5, 9, 9]], [0, 1]), boxes([[1, 1, 3, 3]], [1])]
    said = [Boxes(one.boxes, one.classes, torch.ones(len(one.classes))) for one in true]
    scores = detection_scores(true, said, 3)
    assert (scores.ap, scores.ap50, scores.ap75) == (1, 1, 1)
    assert scores.by_class[:2] == (1, 1) and math.isnan(scores.by_class[2])
    nothing = [boxes([], [], []) for _ in true]
    assert detection_scores(true, nothing, 3).ap == 0
    assert math.isnan(detection_scores(nothing, said, 3).ap)


def test_one_true_box_of_two_behind_a_false_one():
    """Right at rank 2: precision 1/2 up to recall 1/2, which 51 of 101 recalls are at or below."""
    true = [boxes([[0, 0, 10, 10], [20, 20, 30, 30]])]
    said = [boxes([[40, 40, 50, 50], [0, 0, 10, 10]], scores=[0.9, 0.8])]
    assert detection_scores(true, said, 1).ap50 == pytest.approx(0.5 * 51 / 101)
    first = [boxes([[40, 40, 50, 50], [0, 0, 10, 10]], scores=[0.7, 0.8])]
    assert detection_scores(true, first, 1).ap50 == pytest.approx(51 / 101)


def test_a_box_is_found_once():
    true = [boxes([[0, 0, 10, 10]])]
    twice = [boxes([[0, 0, 10, 10], [0, 0, 10, 9]], scores=[0.9, 0.8])]
    assert detection_scores(true, twice, 1).ap50 == 1  # the second comes after recall 1
    true = [boxes([[0, 0, 10, 10], [50, 50, 60, 60]])]
    both = [boxes([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], scores=[0.9, 0.8, 0.7])]
    assert detection_scores(true, both, 1).ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_overlap_decides_at_each_threshold():
    true = [boxes([[0, 0, 10, 10]])]
    said = [boxes([[0, 0, 10, 7.2]], scores=[0.5])]  # IoU 0.72
    scores = detection_scores(true, said, 1)
    assert (scores.ap50, scores.ap75) == (1, 0) and scores.ap == pytest.approx(0.5)


def test_cocos_own_code_gives_the_same_figures():
    stored = load_file(FIXTURE)
    images = int(stored["true"][:, 0].max()) + 1

    def split(rows):
        parts = [rows[rows[:, 0] == image] for image in range(images)]
        return [Boxes(part[:, 2:6].float(), part[:, 1].long(), part[:, 6:].flatten().float()) for part in parts]

    scores = detection_scores(split(stored["true"]), split(stored["predicted"]), 3)
    found = torch.tensor([scores.ap, scores.ap50, scores.ap75, *scores.by_class], dtype=torch.float64)
    torch.testing.assert_close(found, stored["figures"], atol=1e-6, rtol=0)
    assert 0.1 < scores.ap < scores.ap50 < 0.8


def by_loops(true, said, kind, threshold):
    """Sorted over all images; one prediction at a time; precision at 101 recalls."""
    free = [[bool(k == kind) for k in one.classes.tolist()] for one in true]
    wanted = sum(map(sum, free))
    ranked = sorted(
        ((float(s), n, i) for n, one in enumerate(said) for i, s in enumerate(one.scores) if one.classes[i] == kind),
        key=lambda entry: -entry[0],
    )
    right, points = 0, []
    for rank, (_, n, i) in enumerate(ranked, 1):
        best, place = threshold, None
        for j, open_ in enumerate(free[n]):
            overlap = float(box_iou(said[n].boxes[i : i + 1].double(), true[n].boxes[j : j + 1].double()))
            if open_ and overlap >= best:
                best, place = overlap, j
        if place is not None:
            free[n][place], right = False, right + 1
        points.append((right / wanted, right / rank))
    levels = [max((p for r, p in points if r >= min(step * 0.01, 1)), default=0.0) for step in range(101)]
    return sum(levels) / 101


def test_random_scenes_agree_with_loops():
    generator = torch.Generator().manual_seed(0)

    def drawn(count):
        low = torch.rand(count, 2, generator=generator)
        return torch.cat([low, low + 0.2 + 0.3 * torch.rand(count, 2, generator=generator)], 1)

    true, said = [], []
    for _ in range(12):
        truth = drawn(4)
        kinds = torch.randint(0, 2, (4,), generator=generator)
        moved = torch.cat([truth + 0.05 * torch.randn(4, 4, generator=generator), drawn(3)])
        guessed = torch.cat([kinds, torch.randint(0, 2, (3,), generator=generator)])
        true.append(Boxes(truth, kinds))
        said.append(Boxes(moved, guessed, torch.rand(7, generator=generator)))
    scores = detection_scores(true, said, 2)
    expected = [[by_loops(true, said, kind, threshold) for threshold in THRESHOLDS] for kind in range(2)]
    assert scores.by_class == pytest.approx([sum(row) / 10 for row in expected])
    assert scores.ap50 == pytest.approx((expected[0][0] + expected[1][0]) / 2)
    assert 0.1 < scores.ap < scores.ap50 < 1


def test_what_cannot_be_ranked_is_refused():
    one = boxes([[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="1 images and predictions for 2"):
        detection_scores([one], [one, one], 1)
    with pytest.raises(ValueError, match="predictions have no scores"):
        detection_scores([one], [one], 1)
