"""Untrimmed videos as class scores over time, in which only a class's whole course tells an action from a distractor.

Every video has one action class with one or two segments of score 1. Up to four other classes have a segment of the
same score and length; more than four steps away from it they lie at -1, where the action's class lies at 0. Nothing
within four steps of a segment says which it is.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.tasks.temporal_detection import boundary_labels

__all__ = ["ActionVideos", "action_videos"]

NEAR = 4  # steps around a distractor's segment in which it looks like an action


@dataclass(frozen=True)
class ActionVideos:
    """Scores `[n c t]`, segments `[k 2]` of each video and of its distractors in shares of its length, and labels."""

    scores: Float[Tensor, "n c t"]
    segments: list[np.ndarray]
    labels: dict[str, Tensor]
    distractors: list[np.ndarray]

    def truth(self) -> dict[str, np.ndarray]:
        """Segments by the number of the video as its name."""
        return {str(number): segments for number, segments in enumerate(self.segments)}

    def batch(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores and labels of some videos."""
        return self.scores[index], {name: value[index] for name, value in self.labels.items()}


def action_videos(
    videos: int,
    *,
    steps: int = 24,
    classes: int = 8,
    distractors: int = 4,
    length: tuple[int, int] = (4, 10),
    noise: float = 0.3,
    seed: int = 0,
) -> ActionVideos:
    """Draw videos.

    distractors: the most of them in one video, each of a class of its own. length: of segments, in steps.
    Raises ValueError where two segments do not fit, and for as many distractors as classes or more.
    """
    low, high = length
    if videos < 1 or not 1 <= low <= high or 2 * high + 2 > steps or not 0 <= distractors < classes:
        raise ValueError(
            f"action_videos: videos {videos}, steps {steps}, length {length}, distractors {distractors}, classes "
            f"{classes}; two of the longest segments and a gap must fit, and distractors be fewer than classes"
        )
    rng = np.random.default_rng(seed)
    scores = noise * rng.standard_normal((videos, classes, steps))
    every, others, labels = [], [], []
    for number in range(videos):
        order = rng.permutation(classes)
        segments = _apart(rng, steps, length, int(rng.integers(1, 3)))
        for start, end in segments:
            scores[number, order[0], start:end] += 1
        false = []
        for which in order[1 : 1 + int(rng.integers(1, distractors + 1))] if distractors else ():
            ((start, end),) = _apart(rng, steps, length, 1)
            scores[number, which] -= 1
            scores[number, which, max(0, start - NEAR) : end + NEAR] += 1
            scores[number, which, start:end] += 1
            false.append((start / steps, end / steps))
        every.append(np.array(segments, dtype=float) / steps)
        others.append(np.array(false, dtype=float).reshape(-1, 2))
        labels.append(boundary_labels(torch.as_tensor(every[-1], dtype=torch.float32), steps))
    stacked = {name: torch.stack([one[name] for one in labels]) for name in labels[0]}
    return ActionVideos(torch.as_tensor(scores, dtype=torch.float32), every, stacked, others)


def _apart(rng: np.random.Generator, steps: int, length: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Segments in steps that neither overlap nor touch."""
    while True:
        found: list[tuple[int, int]] = []
        for _ in range(count):
            size = int(rng.integers(length[0], length[1] + 1))
            start = int(rng.integers(0, steps - size + 1))
            found.append((start, start + size))
        found.sort()
        if all(first[1] < second[0] for first, second in pairwise(found)):
            return found
