"""Labelled images as transformers' Trainer takes them: in memory, or opened when they are asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headwise.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


class Labelled(Dataset):
    """Images and labels by number."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError


class InMemory(Labelled):
    """Images that lie in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Pictures(Labelled):
    """Pictures that are opened when they are asked for."""

    def __init__(self, items: Sequence[tuple[Any, int]], open_picture: Callable[[Any], Tensor]) -> None:
        self.items, self.open_picture = items, open_picture

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture, label = self.items[index]
        return {"pixel_values": self.open_picture(picture), "labels": torch.tensor(label)}


def pixels(picture: Any, size: tuple[int, int]) -> Tensor:
    """`[3 h w]` in [0, 1] of a PIL picture, resized to (height, width)."""
    import numpy

    resized = picture.convert("RGB").resize((size[1], size[0]))
    return torch.from_numpy(numpy.asarray(resized, dtype=numpy.float32) / 255).permute(2, 0, 1).contiguous()


def open_pixels(path: Path, size: tuple[int, int]) -> Tensor:
    """The same of a file. Raises InputError where it holds no picture."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError('data: pillow is not installed; pip install "headwise[vision]"') from None
    try:
        with Image.open(path) as picture:
            return pixels(picture, size)
    except OSError as error:
        raise InputError(f"data: {path} cannot be read as a picture ({error})") from error


def patch_of(height: int, width: int) -> int:
    """A patch that divides both sides: 8 or more along the shorter one, 4 or more on pictures below 32 pixels."""
    side = min(height, width)  # single pixels as tokens did not train on digits
    return next(p for p in range(max(1, side // (8 if side >= 32 else 4)), 0, -1) if height % p == 0 == width % p)
