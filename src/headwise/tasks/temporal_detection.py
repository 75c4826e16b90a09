"""Finding actions in time: annotations, labels of segments, soft-NMS, average precision and recall.

Formats: ActivityNet's JSON (`database`), the per-video JSON of BMN's official data, and THUMOS-14's text files.
Segments are (start, end) in seconds, or in shares of the video from 0 to 1 where that is said.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "ActivityNetAnnotations",
    "Detection",
    "VideoAnnotation",
    "average_precision",
    "average_recall",
    "boundary_labels",
    "proposals_of",
    "soft_nms",
    "temporal_iou",
]


def temporal_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union `[n m]` of segments `[n 2]` and `[m 2]`; 0 where both are points."""
    a, b = np.asarray(a, dtype=float).reshape(-1, 2), np.asarray(b, dtype=float).reshape(-1, 2)
    shared = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    shared = np.clip(shared, 0, None)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


# Annotations


@dataclass(frozen=True)
class VideoAnnotation:
    """A video: its subset ("training", "validation", ...), length in seconds, segments `[k 2]` and their labels."""

    subset: str
    duration: float
    segments: np.ndarray
    labels: tuple[str, ...]


@dataclass
class ActivityNetAnnotations:
    """The videos of a file by their ids, and how many segments had to be clipped or left out."""

    videos: dict[str, VideoAnnotation]
    clipped: int = 0
    dropped: int = 0
    labels: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.labels:
            every = sorted({label for video in self.videos.values() for label in video.labels})
            self.labels = {label: number for number, label in enumerate(every)}

    @classmethod
    def read(cls, path: str | Path) -> "ActivityNetAnnotations":
        """ActivityNet's `{"database": {id: {subset, duration, annotations}}}`, or BMN's `{id: {duration_second, ...}}`.

        In the latter only `feature_frame` of `duration_frame` frames have features, and the duration is shortened so.
        Segments that reach beyond the video are clipped, those without a length are left out, with one warning.
        Raises ValueError for another document.
        """
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        database = document.get("database", document) if isinstance(document, dict) else None
        if not isinstance(database, dict) or not all(isinstance(one, dict) for one in database.values()):
            raise ValueError(f"{path}: no ActivityNet annotations; expected an object 'database' of videos by id")
        videos, clipped, dropped = {}, 0, 0
        for name, entry in database.items():
            duration = _duration(entry, f"{path}, {name}")
            given = [
                ([float(moment) for moment in one["segment"]], str(one.get("label", "action")))
                for one in entry.get("annotations", ())
            ]
            segments, labels, cut, lost = _clean(given, duration)
            clipped, dropped = clipped + cut, dropped + lost
            videos[name] = VideoAnnotation(str(entry.get("subset", "")), duration, segments, labels)
        return cls(videos, clipped, dropped)._said(path)

    @classmethod
    def read_thumos(
        cls, folder: str | Path, durations: Mapping[str, float], *, ambiguous: bool = False
    ) -> "ActivityNetAnnotations":
        """THUMOS-14's `CLASS_val.txt` and `CLASS_test.txt`: lines `video_test_0000004 0.2 1.1`, in seconds.

        durations: seconds of every video, which the files do not say. ambiguous: keep the class Ambiguous, too.
        Raises ValueError for a folder without such files and a video without a duration.
        """
        given: dict[str, list[tuple[list[float], str]]] = {}
        for path in sorted(Path(folder).glob("*.txt")):
            said = re.fullmatch(r"(.+)_(val|test)\.txt", path.name)
            if said is None or (said[1] == "Ambiguous" and not ambiguous):
                continue
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    name, start, end = line.split()
                    given.setdefault(name, []).append(([float(start), float(end)], said[1]))
        if not given:
            raise ValueError(f"{folder}: no THUMOS-14 annotations; expected files as BaseballPitch_val.txt")
        videos, clipped, dropped = {}, 0, 0
        for name in sorted(given):
            if name not in durations:
                raise ValueError(f"{folder}: video {name} has no duration; give its seconds in durations")
            segments, labels, cut, lost = _clean(given[name], durations[name])
            clipped, dropped = clipped + cut, dropped + lost
            subset = "test" if "_test_" in name else "validation"
            videos[name] = VideoAnnotation(subset, durations[name], segments, labels)
        return cls(videos, clipped, dropped)._said(folder)

    def of_subset(self, subset: str) -> dict[str, VideoAnnotation]:
        """The videos of one subset."""
        return {name: video for name, video in self.videos.items() if video.subset == subset}

    def _said(self, path: Any) -> "ActivityNetAnnotations":
        if self.clipped or self.dropped:
            warnings.warn(
                f"{path}: {self.clipped} segments reached beyond their video and were clipped, {self.dropped} without "
                "a length were left out",
                stacklevel=3,
            )
        return self


def _duration(entry: Mapping[str, Any], where: str) -> float:
    seconds = entry.get("duration", entry.get("duration_second"))
    if not isinstance(seconds, int | float) or seconds <= 0:
        raise ValueError(f"{where}: duration is {seconds}; expected its seconds")
    if "feature_frame" in entry and entry.get("duration_frame"):
        return float(entry["feature_frame"]) / float(entry["duration_frame"]) * float(seconds)
    return float(seconds)


def _clean(
    given: Sequence[tuple[Sequence[float], str]], duration: float
) -> tuple[np.ndarray, tuple[str, ...], int, int]:
    """Segments inside the video, their labels, and how many were clipped and left out."""
    segments, labels, clipped, dropped = [], [], 0, 0
    for (start, end), label in given:
        low, high = max(0.0, float(start)), min(duration, float(end))
        if not low < high:
            dropped += 1
            continue
        clipped += (low, high) != (float(start), float(end))
        segments.append((low, high))
        labels.append(label)
    return np.array(segments, dtype=float).reshape(-1, 2), tuple(labels), clipped, dropped


# Labels


def boundary_labels(segments: Float[Tensor, "k 2"], steps: int) -> dict[str, Tensor]:
    """What BMN learns of a video: "overlap" `[t t]`, "starts" and "ends" `[t]`.

    segments: in shares of the video, 0 to 1. overlap[i, j], j >= i, is the largest IoU of (i / t, (j + 1) / t) with a
    segment. starts[i] is the largest share of ((i - 0.5) / t, (i + 0.5) / t) inside a window of length 3 / t around a
    start, ends likewise. Without segments everything is 0. Raises ValueError for fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"boundary_labels: steps is {steps}; expected at least 2")
    if not len(segments):
        return {"overlap": torch.zeros(steps, steps), "starts": torch.zeros(steps), "ends": torch.zeros(steps)}
    segments = segments.double()
    low = torch.arange(steps, dtype=torch.float64) / steps
    high = low + 1 / steps
    start, end = segments.unbind(1)
    shared = torch.minimum(high[None, :, None], end) - torch.maximum(low[:, None, None], start)
    shared = shared.clamp_min(0)
    union = (high[None, :] - low[:, None])[..., None] + (end - start) - shared
    overlap = (shared / union.clamp_min(1e-12)).amax(-1).triu()

    def near(moments: Tensor) -> Tensor:
        centre = low[:, None]
        left, right = moments - 1.5 / steps, moments + 1.5 / steps
        inside = torch.minimum(centre + 0.5 / steps, right) - torch.maximum(centre - 0.5 / steps, left)
        return (inside.clamp_min(0) * steps).amax(1).clamp_max(1)

    return {"overlap": overlap.float(), "starts": near(start).float(), "ends": near(end).float()}


# Detections


class Detection(NamedTuple):
    """Something found: in which video, from when to when, and how sure."""

    video: str
    start: float
    end: float
    score: float


def proposals_of(
    confidence: Float[Tensor, "2 t t"], starts: Float[Tensor, " t"], ends: Float[Tensor, " t"]
) -> tuple[np.ndarray, np.ndarray]:
    """Segments `[p 2]` in shares of the video and scores `[p]` of every pair i <= j < t - 1 from one BMN output.

    score(i, j) = starts[i] ends[j + 1] confidence[0, i, j] confidence[1, i, j] for the segment from i to j + 1: the end
    is read at j + 1, as in the official code (OpenTAD reads it at j).
    """
    steps = len(starts)
    first, last = np.triu_indices(steps - 1)
    maps, begin, stop = (np.asarray(x.detach().cpu(), dtype=float) for x in (confidence, starts, ends))
    scores = begin[first] * stop[last + 1] * maps[0, first, last] * maps[1, first, last]
    return np.stack([first, last + 1], 1) / steps, scores


def soft_nms(
    segments: np.ndarray,
    scores: np.ndarray,
    *,
    sigma: float = 0.4,
    low: float = 0.5,
    high: float = 0.9,
    keep: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """The `keep` best segments `[k 2]` and their scores, each lowered by its overlap with better ones.

    After each choice, others whose IoU with it exceeds low + (high - low) * width, its width in the segments' unit
    (shares of the video), are multiplied by exp(-IoU^2 / sigma). The paper's values; low = high = 0 is the common form.
    Ties go to the earlier segment. Raises ValueError for lengths that do not match and a sigma that is not positive.
    """
    left, value = np.array(segments, dtype=float).reshape(-1, 2), np.array(scores, dtype=float)
    if len(left) != len(value) or sigma <= 0:
        raise ValueError(
            f"soft_nms: {len(left)} segments, {len(value)} scores, sigma {sigma}; they must match, sigma > 0"
        )
    alive = np.ones(len(value), dtype=bool)
    chosen, kept = [], []
    while alive.any() and len(chosen) < keep:
        best = int(np.argmax(np.where(alive, value, -np.inf)))
        alive[best] = False
        chosen.append(best)
        kept.append(value[best])
        overlap = temporal_iou(left, left[best : best + 1])[:, 0]
        width = left[best, 1] - left[best, 0]
        lowered = alive & (overlap > low + (high - low) * width)
        value[lowered] *= np.exp(-np.square(overlap[lowered]) / sigma)
    return left[chosen], np.array(kept)


def average_precision(
    detections: Sequence[Detection], truth: Mapping[str, np.ndarray], tiou: Sequence[float] = (0.5,)
) -> np.ndarray:
    """Interpolated average precision of one class at each IoU threshold, over all videos at once: `[len(tiou)]`.

    truth: segments `[k 2]` of every video. Detections are taken by score, ties in the order given; each takes the
    segment of its video that it overlaps most among those not yet taken, if by the threshold or more. This is
    ActivityNet's evaluation.
    Raises ValueError where there is nothing to find.
    """
    total = sum(len(segments) for segments in truth.values())
    if not total:
        raise ValueError("average_precision: the truth has no segment; there is nothing to find")
    order = sorted(range(len(detections)), key=lambda i: -detections[i].score)
    hits = np.zeros((len(tiou), len(order)))
    taken = {video: np.zeros((len(tiou), len(segments)), dtype=bool) for video, segments in truth.items()}
    for rank, i in enumerate(order):
        one = detections[i]
        if one.video not in truth or not len(truth[one.video]):
            continue
        overlap = temporal_iou(np.array([[one.start, one.end]]), truth[one.video])[0]
        best = np.argsort(-overlap, kind="stable")
        for row, least in enumerate(tiou):
            for j in best:
                if overlap[j] < least:
                    break
                if not taken[one.video][row, j]:
                    taken[one.video][row, j] = True
                    hits[row, rank] = 1
                    break
    return np.array([_interpolated(row, total) for row in hits])


def _interpolated(hits: np.ndarray, total: int) -> float:
    if not len(hits):
        return 0.0
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / total
    best = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(np.concatenate([[0.0], recall]))
    return float((steps * best).sum())


def average_recall(
    detections: Sequence[Detection],
    truth: Mapping[str, np.ndarray],
    *,
    proposals: int = 100,
    tiou: Sequence[float] = tuple(0.5 + 0.05 * i for i in range(10)),
) -> float:
    """Share of true segments that one of the best `proposals` of their video reaches, averaged over thresholds.

    The best of each video, not of all videos together as ActivityNet's server takes them.
    Raises ValueError where there is nothing to find.
    """
    total = sum(len(segments) for segments in truth.values())
    if not total:
        raise ValueError("average_recall: the truth has no segment; there is nothing to find")
    found = np.zeros(len(tiou))
    for video, segments in truth.items():
        own = sorted((one for one in detections if one.video == video), key=lambda one: -one.score)[:proposals]
        if own and len(segments):
            reached = temporal_iou(segments, np.array([[one.start, one.end] for one in own])).max(1)
            found += (reached[None] >= np.asarray(tiou)[:, None] - 1e-12).sum(1)
    return float((found / total).mean())
