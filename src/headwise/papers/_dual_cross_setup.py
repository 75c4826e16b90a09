"""What dual_cross_attention.py trains: the same small vision transformers with and without the two cross-attentions.

Digits: 200 training images, 8 x 8 pixels, patches of 2, accuracy on the 597 test images that all papers share.
Re-identification: 48 people by 4 cameras for training, 48 others for testing, 24 x 12 pixels, patches of 3, mAP.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.papers.running import Run
from headwise.tasks.digits import Digits, digit_batches, digit_images
from headwise.tasks.reidentification import IdentityImages, identity_batches, identity_images, reid_metrics
from headwise.training import OptimiserSpec, fit, warmup_cosine

STEPS = {"digits": 500, "people": 500}
RATIO = {"digits": 0.3, "people": 0.3}
PEOPLE = 48
# width, blocks: two baselines, as DeiT-Tiny and ViT-Base are the paper's
BACKBONES = {"small": (32, 2), "large": (48, 4)}
PLAIN, LOCAL, PAIR, DUAL = "baseline", "GLCA", "PWCA", "DCAL"
LONGER = "baseline, twice"
MEAN, RANDOM = "GLCA, mean", "GLCA, mean, random"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"glca_layers": 0, "pwca": False},
    LONGER: {"glca_layers": 0, "pwca": False},
    LOCAL: {"pwca": False},
    MEAN: {"pwca": False, "readout": "mean"},
    RANDOM: {"pwca": False, "readout": "mean", "selection": "random"},
    PAIR: {"glca_layers": 0},
    DUAL: {},
}


def backbone(task: str, size: str) -> Any:
    """An untrained ViTModel with a class token.

    Its weights have the spread of torch's linear layers: from DeiT's 0.02 networks as narrow as these learn far slower.
    """
    from transformers import ViTConfig, ViTModel

    width, blocks = BACKBONES[size]
    grid: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    if task == "people":
        grid = {"image_size": (24, 12), "patch_size": (3, 3), "num_channels": 3}
    options: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": 2 * width}
    return ViTModel(ViTConfig(num_attention_heads=4, initializer_range=(3 * width) ** -0.5, **options, **grid))


def wrapped(task: str, size: str, arm: str, seed: int) -> DualCrossAttention:
    """The network of an arm; the backbone starts alike in all arms of a seed."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"local_ratio": RATIO[task], **ARMS[arm]}
    if task == "people":
        options["objective"] = "reidentification"
    return DualCrossAttention(backbone(task, size), 10 if task == "digits" else PEOPLE, **options)


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return model(images, labels=labels).loss


def trained(task: str, size: str, arm: str, draw: Callable[..., Any], seed: int, device: str) -> DualCrossAttention:
    model: Any = wrapped(task, size, arm, seed)
    model.to(device)

    def batches(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = draw(step, generator)
        return images.to(device), labels.to(device)

    fit(
        model,
        batches,
        loss,
        steps=STEPS[task] * (2 if arm == LONGER else 1),
        seed=seed,
        optimiser=OptimiserSpec(lr=2e-3, weight_decay=0.05),
        schedule=warmup_cosine(STEPS[task] // 5),
    )
    return model


@dataclass
class Recognised:
    """Shares right of the test digits: all branches together and SA alone, and SA on the training images."""

    both: float
    alone: float
    trained_on: float
    model: Any = field(repr=False, default=None)


@torch.no_grad()
def recognised(model: Any, data: Digits) -> Recognised:
    device = next(model.parameters()).device
    model.eval()
    out = model(data.test_images.to(device))
    seen = model(data.images.to(device)).branch_logits["self"].argmax(-1).cpu()

    def share(logits: Tensor, labels: Tensor) -> float:
        return float((logits.argmax(-1).cpu() == labels).double().mean())

    return Recognised(
        share(out.logits, data.test_labels),
        share(out.branch_logits["self"], data.test_labels),
        float((seen == data.labels).double().mean()),
        model,
    )


@dataclass
class Found:
    """How well people are found again: mAP of all features and of SA's alone, and where SA's class token looks.

    background: its share of the rollout response. entropy: of the response over patches, as a share of the largest.
    parts: how many parts of a person hold one of the patches of highest response (as many as GLCA selects).
    """

    both: float
    alone: float
    rank: float
    background: float
    entropy: float
    parts: float
    responses: Tensor = field(repr=False, default_factory=lambda: torch.zeros(0))


@torch.no_grad()
def found(model: Any, data: IdentityImages) -> Found:
    device = next(model.parameters()).device
    model.eval()
    images = data.images.to(device)
    features, width = model(images).features.cpu(), model.config.backbone_config.hidden_size

    def scores(one: Tensor) -> dict[str, float]:
        query = torch.zeros(len(one), dtype=torch.bool)
        query[::2] = True  # every other image of each person and camera
        return reid_metrics(
            one[query],
            one,
            query_identities=data.identities[query],
            gallery_identities=data.identities,
            query_cameras=data.cameras[query],
            gallery_cameras=data.cameras,
        )

    both, alone = scores(features), scores(features[:, :width])
    response = model.responses(images).cpu()
    response = response / response.sum(1, keepdim=True)
    shares = part_shares(data.parts)
    entropy = -(response * response.clamp_min(1e-12).log()).sum(1) / torch.tensor(float(response.shape[1])).log()
    count = -(-response.shape[1] * 3 // 10)
    best = torch.zeros_like(response).scatter(1, response.topk(count, 1).indices, 1.0)
    hit = ((best[..., None] * (shares >= 0.25))[..., 1:].amax(1) > 0).double().sum(1)
    return Found(
        both["mAP"],
        alone["mAP"],
        both["rank-1"],
        float((response * shares[..., 0]).sum(1).mean()),
        float(entropy.mean()),
        float(hit.mean()),
        response,
    )


def part_shares(parts: Tensor) -> Tensor:
    """`[n patches 5]`: the share of each patch's pixels that each part has."""
    one = torch.nn.functional.one_hot(parts, 5).float().permute(0, 3, 1, 2)
    return torch.nn.functional.avg_pool2d(one, 3).flatten(2).mT


@dataclass
class Results:
    """digits, people: (backbone, arm) -> what was measured. cost: seconds of training of each arm."""

    digits: dict[tuple[str, str], Recognised]
    people: dict[tuple[str, str], Found]
    seen: IdentityImages
    seconds: dict[str, float]


def results(run: Run) -> Results:
    """Train every arm of one seed."""
    data = digit_images(200)
    train = identity_images(range(PEOPLE), per_camera=4, seed=run.seed)
    test = identity_images(range(1000, 1000 + PEOPLE), per_camera=2, seed=run.seed)
    digits: dict[tuple[str, str], Recognised] = {}
    people: dict[tuple[str, str], Found] = {}
    seconds: dict[str, float] = {}
    plan = [("digits", "large", arm) for arm in ARMS]
    plan += [(task, size, arm) for task, size in (("people", "small"), ("people", "large"))
             for arm in (PLAIN, DUAL)]  # fmt: skip
    for task, size, arm in plan:
        run.log(f"training {task}, {size} backbone, {arm}")
        start = time.process_time()
        draw = digit_batches(data, 32) if task == "digits" else identity_batches(train)
        model = trained(task, size, arm, draw, run.seed, run.device)
        if (task, size) == ("digits", "large"):
            seconds[arm] = time.process_time() - start
        if task == "digits":
            digits[size, arm] = recognised(model, data)
            run.log(f"{digits[size, arm]}")
        else:
            people[size, arm] = found(model, test)
            run.log(f"{people[size, arm]}")
    return Results(digits, people, test, seconds)
