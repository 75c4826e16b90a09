"""What class_semantics_attention.py trains: small Boundary-Matching Networks on drawn videos of class scores.

600 videos for training, 150 for testing, 24 steps, 8 classes; 800 steps of 16 videos; ten proposals a video after
soft-NMS; average precision at IoU 0.3 to 0.7, whatever the class.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.models.boundary_matching import BoundaryMatchingConfig, BoundaryMatchingNetwork
from headwise.papers.running import Run
from headwise.tasks.temporal_detection import (
    Detection,
    average_precision,
    average_recall,
    proposals_of,
    soft_nms,
    temporal_iou,
)
from headwise.tasks.untrimmed_videos import ActionVideos, action_videos
from headwise.training import OptimiserSpec, fit, warmup_cosine

STEPS, VIDEOS, TESTS = 800, 600, 150
TIOU = (0.3, 0.4, 0.5, 0.6, 0.7)
PROPOSALS = 10
SMALL: dict[str, Any] = {
    "feature_dim": 8,
    "temporal_scale": 24,
    "hidden_1d": 32,
    "hidden_2d": 16,
    "hidden_3d": 16,
    "proposal_dim": 16,
    "num_samples": 6,
    "groups": 1,
    "regression": "plain",
    "positive": 0.8,
}
CSA = {"reduction": 2}
# As many numbers as CSA has, from the features themselves: a narrower channel branch, a grouped temporal one.
SELF = {"source": "features", "hidden_dim": 10, "groups": 4}
PLAIN, SE, SEMANTICS, BOTH, CONTROL = "BMN", "BMN + SE", "BMN + CSA", "BMN + CSA + SE", "BMN + self"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    SE: {"attention": "se", "se_hidden": 16},
    SEMANTICS: {"attention": "csa", "attention_options": CSA},
    BOTH: {"attention": "csa+se", "attention_options": CSA, "se_hidden": 16},
    CONTROL: {"attention": "csa", "attention_options": SELF},
}


def network(arm: str, seed: int) -> BoundaryMatchingNetwork:
    torch.manual_seed(seed)
    return BoundaryMatchingNetwork(BoundaryMatchingConfig(**SMALL, **ARMS[arm]))


def loss(model: Any, batch: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
    scores, labels = batch
    return model(scores, labels=labels).loss


def trained(arm: str, data: ActionVideos, run: Run) -> BoundaryMatchingNetwork:
    model: Any = network(arm, run.seed)
    model.to(run.device)

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        scores, labels = data.batch(torch.randint(len(data.scores), (16,), generator=generator))
        return scores.to(run.device), {name: value.to(run.device) for name, value in labels.items()}

    schedule = warmup_cosine(STEPS // 5)
    fit(model, batches, loss, steps=STEPS, seed=run.seed, optimiser=OptimiserSpec(lr=3e-3), schedule=schedule)
    return model


@dataclass
class Detected:
    """precision: mean of the average precisions at TIOU; half: at 0.5. recall: of the proposals kept.

    fooled: share of the test videos whose best proposal lies on a distractor. parameters, seconds: of the network and
    its training.
    """

    precision: float
    half: float
    recall: float
    fooled: float
    parameters: int = 0
    seconds: float = 0.0
    model: Any = field(repr=False, default=None)


@torch.no_grad()
def detected(model: Any, data: ActionVideos, semantics: Tensor | None = None) -> Detected:
    """semantics: what the attention reads in place of the videos' own scores."""
    device = next(model.parameters()).device
    scores = data.scores.to(device)
    out = model.eval()(scores, None if semantics is None else semantics.to(device))
    detections, fooled = [], 0
    for number in range(len(scores)):
        segments, values = proposals_of(out.confidence[number], out.starts[number], out.ends[number])
        segments, values = soft_nms(segments, values, keep=PROPOSALS)
        detections += [
            Detection(str(number), start, end, score)
            for (start, end), score in zip(segments.tolist(), values.tolist(), strict=True)
        ]
        best = segments[:1]
        fooled += _overlap(best, data.distractors[number]) > _overlap(best, data.segments[number])
    precision = average_precision(detections, data.truth(), TIOU)
    recall = average_recall(detections, data.truth(), proposals=PROPOSALS, tiou=TIOU)
    count = sum(p.numel() for p in model.parameters())
    half = float(precision[TIOU.index(0.5)])
    return Detected(float(precision.mean()), half, recall, fooled / len(scores), count, model=model)


def _overlap(one: np.ndarray, many: np.ndarray) -> float:
    return float(temporal_iou(one, many).max(initial=0.0))


def results(run: Run) -> tuple[dict[str, Detected], ActionVideos]:
    """Train and test every arm of one seed."""
    train = action_videos(VIDEOS, seed=2 * run.seed)
    test = action_videos(TESTS, seed=1_000_000 + run.seed)
    found = {}
    for arm in ARMS:
        start = time.process_time()
        model = trained(arm, train, run)
        found[arm] = detected(model, test)
        found[arm].seconds = time.process_time() - start
        run.log(f"{arm}: {found[arm]}")
    return found, test
