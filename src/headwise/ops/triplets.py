"""The triplet loss with the hardest examples of a batch (Hermans, Beyer and Leibe, 2017)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["batch_hard_triplet"]


def batch_hard_triplet(
    features: Float[Tensor, "b c"], labels: Int[Tensor, " b"], *, margin: float | None = 0.3
) -> Float[Tensor, ""]:
    """Mean over anchors of max(0, margin + farthest positive - nearest negative), Euclidean distances.

    margin: None takes the soft margin log(1 + exp(.)). Anchors without another image of their class, or without one of
    another class, do not count; where none counts the loss is 0, with a gradient of 0.
    """
    same = labels[:, None] == labels[None]
    others = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    squares = (features[:, None] - features[None]).square().sum(-1)
    distance = squares.clamp_min(1e-12).sqrt()  # the root has no gradient at 0
    positive = distance.masked_fill(~same | others, -torch.inf).amax(1)
    negative = distance.masked_fill(same, torch.inf).amin(1)
    usable = positive.isfinite() & negative.isfinite()
    if margin is not None and margin < 0:
        raise ValueError(f"batch_hard_triplet: margin is {margin}; expected 0 or more, or None for the soft margin")
    gap = torch.where(usable, positive - negative, torch.zeros_like(positive))
    each = nn.functional.softplus(gap) if margin is None else (gap + margin).clamp_min(0)
    return (each * usable).sum() / usable.sum().clamp_min(1)
