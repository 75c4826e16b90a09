"""Untrimmed videos for action proposals: drawn ones, or a folder of annotations and of features over time.

Annotations are ActivityNet-1.3's JSON, in which THUMOS-14's are kept, too, or THUMOS-14's own text files.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from headwise.errors import InputError
from headwise.tasks.temporal_detection import ActivityNetAnnotations, VideoAnnotation, boundary_labels
from headwise.tasks.untrimmed_videos import ActionVideos, action_videos

__all__ = ["VideoPart", "VideoSet", "VideoWindow", "load_videos"]

STEPS, VIDEOS, TESTS = 24, 600, 150  # drawn videos: steps of each, for training, for testing
FEATURES = (".npy", ".safetensors")
SUBSETS = {"training": "training", "train": "training", "validation": "validation", "val": "validation"}
INSIDE = 0.75  # share of a segment that must lie in a window to be looked for there
SMALL: dict[str, Any] = {
    "hidden_1d": 32,
    "hidden_2d": 16,
    "hidden_3d": 16,
    "proposal_dim": 16,
    "num_samples": 6,
    "groups": 1,
    "regression": "plain",
    "positive": 0.8,
}


@dataclass(frozen=True)
class VideoWindow:
    """A stretch of a video: from when to when in seconds, its rows of features (None: all), its segments in shares."""

    video: str
    start: float
    end: float
    rows: tuple[int, int] | None
    segments: np.ndarray


class VideoPart(Dataset):
    """Windows of videos as the network takes them: features `[c t]` and the labels that BMN learns."""

    def __init__(self, windows: Sequence[VideoWindow], features: Any, steps: int) -> None:
        self.windows, self.features, self.steps = windows, features, steps

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.windows[index]
        segments = torch.as_tensor(window.segments, dtype=torch.float32).reshape(-1, 2)
        return {
            "features": self.features(window.video, window.rows),
            "labels": boundary_labels(segments, self.steps),
        }


@dataclass(frozen=True)
class VideoSet:
    """Videos to train on and to test on, with what is to be found in the latter.

    truth, names: segments `[k 2]` in seconds of every test video and their classes. scores: classes and their scores
    for a test video, by an outside classifier; None tests proposals whatever the class. overlaps: of average precision.
    numbers: of proposals a video, for average recall. suppression: options of `soft_nms`. network: sizes of BMN.
    """

    name: str
    train: VideoPart
    test: VideoPart
    truth: dict[str, np.ndarray]
    names: dict[str, tuple[str, ...]]
    durations: dict[str, float]
    feature_dim: int
    scores: dict[str, dict[str, float]] | None = None
    overlaps: tuple[float, ...] = tuple(0.5 + 0.05 * i for i in range(10))
    numbers: tuple[int, ...] = (1, 5, 10, 100)
    suppression: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)


def load_videos(source: str, *, steps: int = 100, window: int | None = None, seed: int = 0) -> VideoSet:
    """Untrimmed videos.

    source: "generated" (class scores in which only a class's whole course tells an action from a distractor), or a
    folder with a file of annotations (any `*.json` of ActivityNet's form, THUMOS-14's included, or THUMOS-14's text
    files with a `durations.json`, seconds by video), `features/VIDEO.npy` or `.safetensors` (one array `[rows c]`, the
    name as in the annotations or with `v_` before it) and, for precision by class, `classes.json`:
    `{video: {class: score}}` by an outside classifier, whose two best classes of a video count. Videos of the subset
    training are for training and those of validation for testing; where there is no training, as in THUMOS-14,
    validation is for training and test for testing. Videos without features are left out, with a warning.
    steps: that a video's rows are rescaled to. window: rows of a window, for videos too long to be seen at once;
    windows overlap by half, and a segment is looked for where three quarters of it lie inside.
    Raises InputError for a folder that does not hold these.
    """
    if source == "generated":
        if window is not None:
            raise InputError(f"window: generated videos are seen whole; leave out {window}")
        return _generated(seed)
    if window is not None and window < 2:
        raise InputError(f"window: {window} rows; expected at least 2")
    return _folder(Path(source), steps if window is None else window, window)


def _generated(seed: int) -> VideoSet:
    train, test = action_videos(VIDEOS, seed=2 * seed), action_videos(TESTS, seed=1_000_000 + seed)

    def part(data: ActionVideos) -> VideoPart:
        windows = [VideoWindow(name, 0.0, 1.0, None, segments) for name, segments in data.truth().items()]
        return VideoPart(windows, lambda video, rows: data.scores[int(video)], STEPS)

    return VideoSet(
        "generated",
        part(train),
        part(test),
        test.truth(),
        {name: ("action",) * len(segments) for name, segments in test.truth().items()},
        dict.fromkeys(test.truth(), 1.0),
        feature_dim=train.scores.shape[1],
        overlaps=(0.3, 0.4, 0.5, 0.6, 0.7),
        numbers=(1, 5, 10),
        network=dict(SMALL),
    )


def _folder(root: Path, steps: int, window: int | None) -> VideoSet:
    if not root.is_dir():
        raise InputError(f"data: {root} is no folder; expected generated, or a folder of annotations and features")
    annotations = _annotations(root)
    files = _files(root)
    train, test = _subsets(annotations, root)
    shown = {name: files[name] for name in (*train, *test) if name in files}
    absent = len(train) + len(test) - len(shown)
    if absent:
        warnings.warn(f"{root}: {absent} videos have no features and are left out", stacklevel=3)
    train, test = ({name: one for name, one in part.items() if name in shown} for part in (train, test))
    if not train or not any(len(one.segments) for one in test.values()):
        raise InputError(
            f"data: {root / 'features'} has features of {len(train)} videos to train on and {len(test)} to test on; "
            "expected some of both, named as in the annotations"
        )
    width = read_features(next(iter(shown.values()))).shape[1]

    def features(video: str, rows: tuple[int, int] | None) -> Tensor:
        found = read_features(shown[video], rows)
        if found.shape[1] != width:
            raise InputError(f"data: {shown[video]} has {found.shape[1]} features a row, others have {width}")
        return _rescaled(found, steps)

    def part(videos: Mapping[str, VideoAnnotation], training: bool) -> VideoPart:
        windows = [
            one
            for name, video in videos.items()
            for one in _windows(name, video, None if window is None else len(_rows(shown[name])), window)
            if not training or len(one.segments)
        ]
        return VideoPart(windows, features, steps)

    made = part(train, True)
    if not len(made):
        raise InputError(f"data: no window of {window} rows holds three quarters of a segment; give a longer one")
    long = {"overlaps": (0.3, 0.4, 0.5, 0.6, 0.7), "numbers": (50, 100, 200)} if window is not None else {}
    return VideoSet(
        root.name,
        made,
        part(test, False),
        {name: video.segments for name, video in test.items()},
        {name: video.labels for name, video in test.items()},
        {name: video.duration for name, video in test.items()},
        feature_dim=width,
        scores=_classes(root),
        network={"groups": 4 if width % 4 == 0 else 1},
        # A threshold that grows with a segment's share of the video is for videos of a few minutes.
        suppression={} if window is None else {"low": 0.0, "high": 0.0, "sigma": 0.3},
        **long,
    )


def _annotations(root: Path) -> ActivityNetAnnotations:
    named = [path for path in sorted(root.glob("*.json")) if path.stem not in ("classes", "durations")]
    if len(named) > 1:
        raise InputError(f"data: {root} has {len(named)} files of annotations, {named[0].name} and others; leave one")
    if named:
        try:
            return ActivityNetAnnotations.read(named[0])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"data: {named[0]} cannot be read as annotations ({error})") from error
    path, expected = root / "durations.json", "seconds of each video, {video: seconds}"
    durations = _json(path, expected)
    if not all(isinstance(one, int | float) and one > 0 for one in durations.values()):
        raise InputError(f"data: {path} holds something else; expected {expected}")
    return ActivityNetAnnotations.read_thumos(root, {name: float(one) for name, one in durations.items()})


def _json(path: Path, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"data: {path} cannot be read ({error}); expected {expected}") from error
    if not isinstance(found, dict):
        raise InputError(f"data: {path} is no object; expected {expected}")
    return found


def _classes(root: Path) -> dict[str, dict[str, float]] | None:
    path = root / "classes.json"
    if not path.is_file():
        return None
    expected = "scores of classes, {video: {class: score}}"
    found = _json(path, expected)
    if not all(
        isinstance(one, dict) and all(isinstance(score, int | float) for score in one.values())
        for one in found.values()
    ):
        raise InputError(f"data: {path} holds something else; expected {expected}")
    return found


def _files(root: Path) -> dict[str, Path]:
    """Feature files by the video's id."""
    folder = root / "features"
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in FEATURES:
            found.setdefault(path.stem, path)
            found.setdefault(path.stem.removeprefix("v_"), path)
    if not found:
        raise InputError(f"data: {folder} holds no features; expected VIDEO.npy or VIDEO.safetensors in it")
    return found


def _subsets(
    annotations: ActivityNetAnnotations, root: Path
) -> tuple[dict[str, VideoAnnotation], dict[str, VideoAnnotation]]:
    parts: dict[str, dict[str, VideoAnnotation]] = {}
    for name, video in annotations.videos.items():
        subset = video.subset.lower()
        parts.setdefault(SUBSETS.get(subset, "test" if subset.startswith("test") else subset), {})[name] = video
    order = [kind for kind in ("training", "validation", "test") if _annotated(parts.get(kind, {}))]
    if len(order) < 2:
        raise InputError(
            f"data: {root} has annotated videos of the subsets {', '.join(order) or 'none'}; expected training and "
            "validation, or validation and test"
        )
    train = {name: video for name, video in parts[order[0]].items() if len(video.segments)}
    return train, parts[order[1]]


def _annotated(videos: Mapping[str, VideoAnnotation]) -> bool:
    return any(len(video.segments) for video in videos.values())


def _rows(path: Path) -> Any:
    """Something whose length is the number of a file's rows, without reading them."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return range(file.get_slice(next(iter(file.keys()))).get_shape()[0])


def read_features(path: Path, rows: tuple[int, int] | None = None) -> Float[Tensor, "r c"]:
    """The array of a file, or some of its rows. Raises InputError where it holds no finite numbers `[rows c]`."""
    part = slice(None) if rows is None else slice(*rows)
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)[part]))
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                found = file.get_slice(next(iter(file.keys())))[part]
    except Exception as error:
        raise InputError(f"data: {path} cannot be read as features ({error})") from error
    found = found.float()
    if found.ndim != 2 or not len(found) or not bool(found.isfinite().all()):
        raise InputError(f"data: {path} holds {list(found.shape)} numbers; expected finite ones, [rows c]")
    return found


def _rescaled(features: Float[Tensor, "r c"], steps: int) -> Float[Tensor, "c t"]:
    """Linear interpolation between rows to so many steps."""
    turned = features.T[None]
    if turned.shape[2] != steps:
        turned = torch.nn.functional.interpolate(turned, size=steps, mode="linear", align_corners=False)
    return turned[0].contiguous()


def _windows(name: str, video: VideoAnnotation, rows: int | None, window: int | None) -> Iterator[VideoWindow]:
    """The whole video, or windows of so many rows that overlap by half, the last one ending with the video."""
    if rows is None or window is None or rows <= window:
        yield VideoWindow(name, 0.0, video.duration, None, video.segments / video.duration)
        return
    row = video.duration / rows
    starts = [*range(0, rows - window, window // 2), rows - window]
    for first in starts:
        start, end = first * row, (first + window) * row
        inside = np.clip(video.segments, start, end)
        held = inside[:, 1] - inside[:, 0] >= INSIDE * (video.segments[:, 1] - video.segments[:, 0])
        yield VideoWindow(name, start, end, (first, first + window), (inside[held] - start) / (end - start))
