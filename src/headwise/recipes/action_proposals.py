"""Temporal action proposals: the Boundary-Matching Network, with or without class semantics-based attention (CSA).

Trained by transformers' Trainer on features of untrimmed videos over time (`load_videos`), and tested by average
precision at several overlaps and by average recall at several numbers of proposals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from headwise.models.boundary_matching import BoundaryMatchingConfig, BoundaryMatchingNetwork
from headwise.recipes._trainer import Progress, train_with
from headwise.recipes.proposal_videos import VideoSet
from headwise.tasks.temporal_detection import Detection, average_precision, average_recall, proposals_of, soft_nms

__all__ = ["TrainedProposals", "train_action_proposals"]

BEST = 300  # proposals of a window that soft-NMS sees


@dataclass(frozen=True)
class TrainedProposals:
    """A trained network and what it finds: "mAP" (mean over overlaps), "mAP@0.5", ..., "AR@100", ... as shares.

    Without scores of classes the precision is that of proposals whatever the class, and is called "AP".
    """

    model: BoundaryMatchingNetwork
    metrics: dict[str, float]
    parameters: int


def train_action_proposals(
    data: VideoSet,
    *,
    attention: str | None = "csa",
    steps: int | None = None,
    batch: int = 16,
    learning_rate: float | None = None,
    weight_decay: float = 1e-4,
    out: str | Path | None = None,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedProposals:
    """Train one network and test it. attention: "csa", "se", "csa+se", or None for BMN alone.

    steps: None is 800 of the generated videos, and nine passes over others, as the paper of BMN has them.
    learning_rate: None is 3e-3 and 1e-3. network: sizes of `BoundaryMatchingConfig` other than its defaults.
    training: further `TrainingArguments`. out: folder that the model is written to. progress: called with steps done,
    steps, and a word.
    """
    from transformers import set_seed

    set_seed(seed)
    drawn = data.name == "generated"
    sizes = {"attention_options": {"reduction": 2}} if drawn and attention and "csa" in attention else {}
    config = BoundaryMatchingConfig(
        feature_dim=data.feature_dim,
        temporal_scale=data.train.steps,
        attention=attention,
        **{**data.network, **sizes, **(network or {})},
    )
    model = BoundaryMatchingNetwork(config)
    train_with(
        model,
        data.train,
        steps=steps or (800 if drawn else -(-9 * len(data.train) // batch)),
        batch=batch,
        learning_rate=learning_rate or (3e-3 if drawn else 1e-3),
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        warmup=0.2 if drawn else 0.05,
        training={"remove_unused_columns": False, **(training or {})},
        progress=progress,
        data_collator=default_collate,
    )
    found = _proposals(model, data, batch)
    return TrainedProposals(model, _metrics(found, data), sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def _proposals(model: BoundaryMatchingNetwork, data: VideoSet, batch: int) -> list[Detection]:
    """The best proposals of every test video after soft-NMS, in seconds."""
    model.eval()
    segments: dict[str, list[np.ndarray]] = {name: [] for name in data.truth}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in data.truth}
    windows = iter(data.test.windows)
    for given in DataLoader(data.test, batch, collate_fn=default_collate):
        out = model(given["features"].to(model.device))
        for one in range(len(out.starts)):
            window = next(windows)
            shares, values = proposals_of(out.confidence[one], out.starts[one], out.ends[one])
            best = np.argsort(-values, kind="stable")[:BEST]
            segments[window.video].append(window.start + shares[best] * (window.end - window.start))
            scores[window.video].append(values[best])
    found = []
    for name, parts in segments.items():
        if not parts:
            continue
        whole = np.concatenate(parts) / data.durations[name]
        kept, values = soft_nms(whole, np.concatenate(scores[name]), keep=max(data.numbers), **data.suppression)
        found += [
            Detection(name, start, end, score)
            for (start, end), score in zip((kept * data.durations[name]).tolist(), values.tolist(), strict=True)
        ]
    return found


def _metrics(found: Sequence[Detection], data: VideoSet) -> dict[str, float]:
    name = "AP" if data.scores is None else "mAP"
    precision = _precision(found, data)
    return {
        name: float(precision.mean()),
        **{f"{name}@{overlap:.2g}": float(one) for overlap, one in zip(data.overlaps, precision, strict=True)},
        **{f"AR@{number}": _recall(found, data.truth, number) for number in data.numbers},
    }


def _recall(found: Sequence[Detection], truth: Mapping[str, np.ndarray], number: int) -> float:
    """Average recall over all segments, video by video: thousands of videos have hundreds of thousands of proposals."""
    own: dict[str, list[Detection]] = {}
    for one in found:
        own.setdefault(one.video, []).append(one)
    counts = {video: len(segments) for video, segments in truth.items() if len(segments)}
    shares = (
        count * average_recall(own.get(video, []), {video: truth[video]}, proposals=number)
        for video, count in counts.items()
    )
    return sum(shares) / sum(counts.values())


def _precision(found: Sequence[Detection], data: VideoSet) -> np.ndarray:
    """Average precision at every overlap: whatever the class, or the mean over classes."""
    if data.scores is None:
        return average_precision(found, data.truth, data.overlaps)
    own: dict[str, list[Detection]] = {label: [] for names in data.names.values() for label in names}
    best = {
        video: sorted(data.scores.get(video, {}).items(), key=lambda one: -one[1])[:2]
        for video in {one.video for one in found}
    }
    for one in found:
        for label, score in best[one.video]:
            if label in own:
                own[label].append(one._replace(score=one.score * score))
    rows = []
    for label, detections in own.items():
        truth = {
            video: segments[np.array([name == label for name in data.names[video]], dtype=bool)]
            for video, segments in data.truth.items()
            if label in data.names[video]
        }
        rows.append(average_precision(detections, truth, data.overlaps))
    return np.mean(rows, axis=0)
