"""Annotations, labels, soft-NMS, average precision and recall, each against a loop or a known case."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.tasks.temporal_detection import (
    ActivityNetAnnotations,
    Detection,
    average_precision,
    average_recall,
    boundary_labels,
    proposals_of,
    soft_nms,
    temporal_iou,
)


def iou(a, b):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = a[1] - a[0] + b[1] - b[0] - shared
    return shared / union if union > 0 else 0.0


def test_overlap_equals_the_loop():
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.random((n, 2)), 1) for n in (7, 5))
    assert np.allclose(temporal_iou(a, b), [[iou(x, y) for y in b] for x in a])
    assert temporal_iou(np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]]))[0, 0] == 0
    assert temporal_iou(a, np.zeros((0, 2))).shape == (7, 0)


# Annotations


def write(path, document):
    path.write_text(json.dumps(document))
    return path


def test_activitynet_json(tmp_path):
    file = write(
        tmp_path / "anet.json",
        {
            "database": {
                "a": {
                    "subset": "training",
                    "duration": 10.0,
                    "annotations": [{"segment": [1, 4], "label": "Run"}, {"segment": [8, 9], "label": "Jump"}],
                },
                "b": {"subset": "testing", "duration": 5, "annotations": []},
            }
        },
    )
    found = ActivityNetAnnotations.read(file)
    assert found.labels == {"Jump": 0, "Run": 1} and found.clipped == found.dropped == 0
    assert found.videos["a"].segments.tolist() == [[1, 4], [8, 9]] and found.videos["a"].labels == ("Run", "Jump")
    assert list(found.of_subset("testing")) == ["b"] and found.videos["b"].segments.shape == (0, 2)


def test_segments_outside_are_clipped_and_empty_ones_left_out_with_a_warning(tmp_path):
    segments = [[-1, 3], [8, 12], [5, 5], [7, 6], [11, 12], [2, 4]]
    entry = {"duration": 10, "annotations": [{"segment": one, "label": "x"} for one in segments]}
    with pytest.warns(UserWarning, match="2 segments reached beyond .* 3 without"):
        found = ActivityNetAnnotations.read(write(tmp_path / "a.json", {"database": {"v": entry}}))
    assert found.videos["v"].segments.tolist() == [[0, 3], [8, 10], [2, 4]]
    assert (found.clipped, found.dropped) == (2, 3)


def test_the_official_data_of_bmn_shortens_the_duration(tmp_path):
    entry = {
        "duration_second": 100.0,
        "duration_frame": 1000,
        "feature_frame": 992,
        "annotations": [{"segment": [0, 10]}],
    }
    found = ActivityNetAnnotations.read(write(tmp_path / "b.json", {"v_x": entry}))
    assert found.videos["v_x"].duration == pytest.approx(99.2) and found.videos["v_x"].labels == ("action",)


def test_thumos_text_files(tmp_path):
    (tmp_path / "Diving_test.txt").write_text("video_test_0000004  0.2 1.1\nvideo_test_0000004  3 4.5\n\n")
    (tmp_path / "Shot_val.txt").write_text("video_validation_0000007 2.0 3.0\n")
    (tmp_path / "Ambiguous_test.txt").write_text("video_test_0000004 5 6\n")
    (tmp_path / "readme.txt").write_text("nothing")
    durations = {"video_test_0000004": 9.0, "video_validation_0000007": 8.0}
    found = ActivityNetAnnotations.read_thumos(tmp_path, durations)
    assert found.labels == {"Diving": 0, "Shot": 1}
    assert found.of_subset("test")["video_test_0000004"].segments.tolist() == [[0.2, 1.1], [3, 4.5]]
    assert "Ambiguous" in ActivityNetAnnotations.read_thumos(tmp_path, durations, ambiguous=True).labels
    with pytest.raises(ValueError, match="has no duration"):
        ActivityNetAnnotations.read_thumos(tmp_path, {})
    with pytest.raises(ValueError, match="BaseballPitch_val"):
        ActivityNetAnnotations.read_thumos(tmp_path / "none", durations)


@pytest.mark.parametrize(
    "document", [[1], {"database": [1]}, {"database": {"v": {"duration": 0}}}, {"v": {"duration": "2"}}]
)
def test_other_documents_are_refused(tmp_path, document):
    with pytest.raises(ValueError, match="expected"):
        ActivityNetAnnotations.read(write(tmp_path / "c.json", document))


# Labels


@given(st.lists(st.tuples(st.floats(0, 0.9), st.floats(0.01, 1)), min_size=1, max_size=3), st.integers(2, 9))
def test_labels_equal_the_loops(pairs, steps):
    segments = [(start, min(1.0, start + length)) for start, length in pairs]
    found = boundary_labels(torch.tensor(segments), steps)
    for i in range(steps):
        for j in range(steps):
            expected = max(iou((i / steps, (j + 1) / steps), one) for one in segments) if j >= i else 0.0
            assert float(found["overlap"][i, j]) == pytest.approx(expected, abs=1e-5)
    for name, which in (("starts", 0), ("ends", 1)):
        for t in range(steps):
            anchor = ((t - 0.5) / steps, (t + 0.5) / steps)
            windows = [(one[which] - 1.5 / steps, one[which] + 1.5 / steps) for one in segments]
            shared = max(max(0.0, min(anchor[1], w[1]) - max(anchor[0], w[0])) * steps for w in windows)
            assert float(found[name][t]) == pytest.approx(shared, abs=1e-5)


def test_a_video_without_segments_has_labels_of_zero():
    found = boundary_labels(torch.zeros(0, 2), 4)
    assert found["overlap"].shape == (4, 4) and not any(value.any() for value in found.values())
    with pytest.raises(ValueError, match="steps is 1"):
        boundary_labels(torch.zeros(0, 2), 1)


# Proposals


def test_proposals_by_hand():
    confidence, starts, ends = torch.rand(2, 5, 5), torch.rand(5), torch.rand(5)
    segments, scores = proposals_of(confidence, starts, ends)
    expected = {}
    for i in range(5):
        for j in range(i, 4):
            score = starts[i] * ends[j + 1] * confidence[0, i, j] * confidence[1, i, j]
            expected[i / 5, (j + 1) / 5] = float(score)
    found = {tuple(segment): score for segment, score in zip(segments.tolist(), scores.tolist(), strict=True)}
    assert found == pytest.approx(expected)


def soft_nms_by_loop(segments, scores, sigma, low, high, keep):
    left = [[list(one), score] for one, score in zip(segments, scores, strict=True)]
    found = []
    while left and len(found) < keep:
        best = max(range(len(left)), key=lambda n: left[n][1])
        one, score = left.pop(best)
        found.append((tuple(one), score))
        for other in left:
            overlap = iou(one, other[0])
            if overlap > low + (high - low) * (one[1] - one[0]):
                other[1] *= math.exp(-(overlap**2) / sigma)
    return found


@pytest.mark.parametrize(("low", "high", "keep"), [(0.5, 0.9, 100), (0.0, 0.0, 100), (0.5, 0.9, 3)])
def test_soft_nms_equals_the_loop(low, high, keep):
    rng = np.random.default_rng(1)
    segments, scores = np.sort(rng.random((12, 2)), 1), rng.random(12)
    kept, lowered = soft_nms(segments, scores, low=low, high=high, keep=keep)
    expected = soft_nms_by_loop(segments, scores, 0.4, low, high, keep)
    assert np.allclose(kept, [one for one, _ in expected]) and np.allclose(lowered, [score for _, score in expected])
    assert len(kept) == min(12, keep)


def test_soft_nms_cases():
    same = np.array([[0.0, 0.1], [0.0, 0.1], [0.5, 0.6]])
    kept, scores = soft_nms(same, np.array([0.9, 0.8, 0.7]))
    assert kept.tolist() == [[0, 0.1], [0.5, 0.6], [0, 0.1]]
    assert scores == pytest.approx([0.9, 0.7, 0.8 * math.exp(-2.5)])
    ties, _ = soft_nms(np.array([[0, 0.1], [0.2, 0.3]]), np.array([0.5, 0.5]))
    assert ties.tolist() == [[0, 0.1], [0.2, 0.3]]
    empty, none = soft_nms(np.zeros((0, 2)), np.zeros(0))
    assert empty.shape[0] == none.shape[0] == 0
    with pytest.raises(ValueError, match="3 segments, 2 scores"):
        soft_nms(same, np.zeros(2))


# Average precision


def precision_by_loop(detections, truth, least):
    """ActivityNet's evaluation, one detection at a time, and its interpolated area."""
    order = sorted(range(len(detections)), key=lambda n: -detections[n].score)
    taken, hits = set(), []
    for n in order:
        one = detections[n]
        candidates = sorted(
            ((iou((one.start, one.end), segment), -j) for j, segment in enumerate(truth.get(one.video, []))),
            reverse=True,
        )
        hit = 0
        for overlap, j in candidates:
            if overlap >= least and (one.video, j) not in taken:
                taken.add((one.video, j))
                hit = 1
                break
        hits.append(hit)
    total = sum(len(segments) for segments in truth.values())
    points = [(sum(hits[: n + 1]) / total, sum(hits[: n + 1]) / (n + 1)) for n in range(len(hits))]
    recalls = sorted({0.0, *(recall for recall, _ in points)})
    area = 0.0
    for before, after in pairwise(recalls):
        area += (after - before) * max(precision for recall, precision in points if recall >= after)
    return area


def random_case(seed, videos=6):
    rng = np.random.default_rng(seed)
    truth = {str(v): np.sort(rng.random((int(rng.integers(0, 4)), 2)), 1) for v in range(videos)}
    detections = []
    for v in range(videos + 1):  # one video without any truth
        for _ in range(int(rng.integers(0, 9))):
            base = truth.get(str(v), np.zeros((0, 2)))
            near = base[rng.integers(len(base))] if len(base) and rng.random() < 0.6 else rng.random(2)
            start, end = sorted((near + 0.05 * rng.standard_normal(2)).tolist())
            detections.append(Detection(str(v), start, end, float(rng.random())))
    return detections, truth


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_equals_the_loop(seed):
    detections, truth = random_case(seed)
    thresholds = (0.3, 0.5, 0.75)
    expected = [precision_by_loop(detections, truth, least) for least in thresholds]
    assert average_precision(detections, truth, thresholds) == pytest.approx(expected, abs=1e-12)


def test_average_precision_cases():
    truth = {"a": np.array([[0.0, 1.0]]), "b": np.array([[2.0, 3.0]])}
    right, doubled = Detection("a", 0, 1, 0.9), Detection("a", 0, 1, 0.8)
    other = Detection("b", 2, 3, 0.7)
    assert average_precision([right, other], truth)[0] == 1
    # The double is an error between two hits: 1/2 * 1 + 1/2 * 2/3.
    assert average_precision([other, doubled, right], truth)[0] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision([right], truth)[0] == 0.5
    assert average_precision([], truth)[0] == 0
    wrong = Detection("b", 0, 1, 0.5)
    assert average_precision([Detection("b", 0, 1, 0.9), right], truth)[0] == 0.25
    tied = [wrong, Detection("a", 0, 1, 0.5)]
    assert average_precision(tied, truth)[0] == 0.25 and average_precision(tied[::-1], truth)[0] == 0.5
    with pytest.raises(ValueError, match="nothing to find"):
        average_precision([right], {"a": np.zeros((0, 2))})


def test_average_recall():
    truth = {"a": np.array([[0.0, 1.0], [4.0, 5.0]]), "b": np.array([[0.0, 1.0]])}
    detections = [Detection("a", 0, 1, 0.1), Detection("a", 4, 5, 0.9), Detection("b", 0, 0.7, 0.5)]
    assert average_recall(detections, truth, tiou=(0.5, 0.75)) == pytest.approx((1 + 2 / 3) / 2)
    assert average_recall(detections, truth, proposals=1, tiou=(0.5,)) == pytest.approx(2 / 3)
    assert average_recall([], truth) == 0
    with pytest.raises(ValueError, match="nothing to find"):
        average_recall(detections, {})
