"""Backbones of equal size for dense prediction: the width of each follows from a number of parameters."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from headwise.models._dense import BACKBONES
from headwise.recipes.matching import match_size

__all__ = ["compare_sized", "sized_backbone"]

HEAD = 16  # channels of an attention head


def sized_backbone(
    backbone: str, build: Callable[[dict[str, Any]], nn.Module], *, size: int, parameters: int
) -> dict[str, Any]:
    """Sizes of a small backbone, its `backbone_config`, with which a whole model has about so many parameters.

    build: the model for a backbone_config. size: side of the images in pixels. Two stages of strides 4 and 8, or four
    layers on patches of 4 pixels. The width is a multiple of a head's 16 channels; the MLP (of a ResNet: the second
    stage) is as wide as the budget then asks for.
    Raises ValueError for an unknown backbone, sides that no stage divides, and a budget that no width comes within
    10 % of.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"sized_backbone: backbone is {backbone!r}; choose {', '.join(BACKBONES)}")
    if size % 8 or size < 16:
        raise ValueError(f"sized_backbone: images are {size} pixels wide; expected a multiple of 8, 16 or more")
    sizes = partial(_sizes, backbone, size)
    plain = backbone in ("resnet", "ela-resnet")

    def count(width: int, ratio: float) -> int:
        with torch.random.fork_rng(devices=[]):
            model = build(sizes(width, ratio))
        return sum(p.numel() for p in model.parameters())

    step, bounds = (HEAD // 2, (1.0, 4.0)) if plain else (HEAD, (0.5, 8.0))
    widths = [HEAD]
    while count(widths[-1], bounds[0]) < parameters:
        widths.append(widths[-1] + max(step, widths[-1] // 4 // step * step))
    found = match_size(count, parameters, widths, ratio=2.0 if plain else 4.0, bounds=bounds)
    if abs(found.count / parameters - 1) > 0.1:
        raise ValueError(
            f"sized_backbone: the nearest {backbone} to {parameters:,} parameters has {found.count:,}; "
            "give another number of parameters"
        )
    return sizes(found.width, found.ratio)


def _sizes(backbone: str, size: int, width: int, ratio: float) -> dict[str, Any]:
    heads, ratio = [width // HEAD, 2 * width // HEAD], round(ratio, 6)
    if backbone == "davit":
        own: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [width, 2 * width], "num_heads": heads}
        return {**own, "window_size": 4, "mlp_ratio": ratio, "drop_path_rate": 0.0}
    if backbone in ("neighborhood", "swin"):
        own = {"embed_dim": width, "depths": [2, 2], "num_heads": heads, "mlp_ratio": ratio, "drop_path_rate": 0.0}
        if backbone == "swin":
            return {**own, "window_size": 4, "image_size": size}
        far = [max(1, size // stride // 3) for stride in (4, 8)]  # the widest that the map has room for
        return {**own, "kernel_size": 3, "dilations": [[1, one] for one in far]}
    if backbone in ("resnet", "ela-resnet"):
        wide = int(width * ratio) // 8 * 8  # for the norm groups of the gates
        return {"embedding_size": width, "hidden_sizes": [width, wide], "depths": [2, 2], "layer_type": "basic"}
    own = {"image_size": size, "patch_size": 4, "num_channels": 3, "hidden_size": width, "num_hidden_layers": 4}
    own |= {"num_attention_heads": width // HEAD, "mlp_ratio": ratio}
    return {**own, "num_agents": 9} if backbone == "agent" else own


def compare_sized(
    backbones: Sequence[str],
    seeds: Sequence[int],
    sizes: Callable[[str], dict[str, Any]],
    train: Callable[[str, dict[str, Any], int], Any],
    scores: Sequence[str],
    log: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """One row for each backbone: what every seed scored, means, and the standard deviation of the first score.

    sizes: a backbone's backbone_config. train: a trained model with its scores, for a backbone, its sizes and a seed.
    scores: names of its attributes, the first of which is the one that counts.
    """
    from statistics import mean, stdev

    rows = []
    for name in backbones:
        own, runs = sizes(name), []
        for seed in seeds:
            runs.append(train(name, own, seed))
            if log is not None:
                log(f"{name}, seed {seed}: {scores[0]} {getattr(runs[-1], scores[0]):.3f}")
        every: Mapping[str, list[float]] = {score: [getattr(run, score) for run in runs] for score in scores}
        row: dict[str, Any] = {"backbone": name, "backbone_config": own}
        row |= {"parameters": runs[0].parameters, "flops": runs[0].flops}
        row |= {score: mean(values) for score, values in every.items()}
        row["spread"] = stdev(every[scores[0]]) if len(seeds) > 1 else None
        rows.append({**row, "runs": every})
    return rows
