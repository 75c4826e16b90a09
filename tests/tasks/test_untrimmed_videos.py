"""The drawn videos: what they hold, and that nothing near a segment tells an action from a distractor."""

import pytest
import torch

from headwise.tasks.temporal_detection import boundary_labels
from headwise.tasks.untrimmed_videos import NEAR, action_videos


def test_actions_and_distractors_without_noise():
    data = action_videos(60, noise=0.0, seed=1)
    kinds = set()
    for scores, segments, false in zip(data.scores, data.segments, data.distractors, strict=True):
        action = [row for row in scores if (row > 0).any() and not (row < 0).any()]
        whole = torch.zeros(24)
        for start, end in (segments * 24).round().astype(int):
            assert 4 <= end - start <= 10
            whole[start:end] = 1
        assert len(segments) in (1, 2) and any(torch.equal(row, whole) for row in action)
        kinds.add(len(false))
        for start, end in (false * 24).round().astype(int):
            course = torch.full((24,), -1.0)
            course[max(0, start - NEAR) : end + NEAR] = 0
            course[start:end] = 1
            assert any(torch.equal(row, course) for row in scores)
            near = course[max(0, start - NEAR) : end + NEAR]
            assert set(near.tolist()) <= {0.0, 1.0}, "near its segment a distractor looks like an action"
    assert kinds == {1, 2, 3, 4}


def test_labels_and_batches_are_those_of_the_segments():
    data = action_videos(5, seed=2)
    expected = boundary_labels(torch.as_tensor(data.segments[3], dtype=torch.float32), 24)
    scores, labels = data.batch(torch.tensor([3, 0]))
    assert torch.equal(scores[0], data.scores[3])
    assert all(torch.equal(labels[name][0], expected[name]) for name in expected)
    assert data.truth()["3"] is data.segments[3]


def test_seeds():
    assert torch.equal(action_videos(3, seed=4).scores, action_videos(3, seed=4).scores)
    assert not torch.equal(action_videos(3, seed=4).scores, action_videos(3, seed=5).scores)
    assert all(len(one) == 0 for one in action_videos(4, distractors=0).distractors)


@pytest.mark.parametrize("options", [{"steps": 20}, {"distractors": 8}, {"length": (5, 4)}, {"videos": 0}])
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must fit"):
        action_videos(**{"videos": 2, **options})
