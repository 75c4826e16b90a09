"""scikit-learn's handwritten digits in one split that every paper shares.

The 597 test images are the same whatever is trained.
1,797 images of 8 x 8 pixels in 17 grey levels, ten classes (extra: tasks).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Digits", "digit_batches", "digit_images"]

TEST = 597
TRAIN = (200, 600, 1200)


@dataclass(frozen=True)
class Digits:
    """Images `[n 1 8 8]` in [0, 1] and their labels `[n]`, for training and for testing."""

    images: Float[Tensor, "n 1 8 8"]
    labels: Int[Tensor, " n"]
    test_images: Float[Tensor, "m 1 8 8"]
    test_labels: Int[Tensor, " m"]


def digit_images(train: int = 1200) -> Digits:
    """The digits with the first 200, 600 or all 1,200 training images; the smaller sets lie in the larger ones.

    Raises ValueError for another size.
    """
    if train not in TRAIN:
        raise ValueError(f"digit_images: train is {train}; choose {', '.join(map(str, TRAIN))}")
    images, labels = _shuffled()
    return Digits(images[TEST : TEST + train], labels[TEST : TEST + train], images[:TEST], labels[:TEST])


def digit_batches(data: Digits, batch: int):
    """`(step, generator) -> (images, labels)`: what `training.fit` draws its batches from."""

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(data.images), (batch,), generator=generator)
        return data.images[index], data.labels[index]

    return draw


@cache
def _shuffled() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(raw.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.as_tensor(raw.target, dtype=torch.long)[order]
