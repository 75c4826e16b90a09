"""Canvases of scikit-learn's digits: one digit among clutter, and one of three digits that a bar far away marks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["DigitCanvases", "cluttered_digits", "marked_digits"]

DIGIT = 8  # pixels of a digit's side


@dataclass(frozen=True)
class DigitCanvases:
    """Images `[n 1 h w]` in [0, 1], labels `[n]`, and the top left pixel of the digit that counts `[n 2]`."""

    images: Float[Tensor, "n 1 h w"]
    labels: Int[Tensor, " n"]
    corners: Int[Tensor, "n 2"]


def marked_digits(
    images: Float[Tensor, "m 1 8 8"],
    labels: Int[Tensor, " m"],
    count: int,
    *,
    bands: int = 3,
    width: int = 40,
    nearest: int = 18,
    seed: int = 0,
) -> DigitCanvases:
    """One digit in each of `bands` rows of digits, a bright bar of 4 x 2 pixels at the left edge of one of them.

    The label is the digit in the marked band. nearest: the least column of a digit; columns and digits are drawn with
    replacement, evenly. Raises ValueError where no digit fits.
    """
    if not 2 <= nearest <= width - DIGIT or bands < 1 or count < 1:
        raise ValueError(
            f"marked_digits: count {count}, bands {bands}, width {width}, nearest {nearest}; expected 1 or more "
            f"canvases and bands, and nearest from 2 to width - {DIGIT}"
        )
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count, bands), generator=rng)
    left = torch.randint(nearest, width - DIGIT + 1, (count, bands), generator=rng)
    band = torch.randint(bands, (count,), generator=rng)
    canvas = torch.zeros(count, DIGIT * bands, width)
    row, column = torch.meshgrid(torch.arange(DIGIT), torch.arange(DIGIT), indexing="ij")
    each = torch.arange(count)[:, None, None]
    for place in range(bands):
        canvas[each, row + DIGIT * place, column + left[:, place, None, None]] = images[chosen[:, place], 0]
    bar = torch.arange(4)[:, None]
    canvas[each, bar + DIGIT * band[:, None, None] + 2, torch.arange(2)] = 1.0
    which = torch.arange(count)
    corners = torch.stack([DIGIT * band, left[which, band]], 1)
    return DigitCanvases(canvas[:, None], labels[chosen[which, band]], corners)


def cluttered_digits(
    images: Float[Tensor, "m 1 8 8"],
    labels: Int[Tensor, " m"],
    count: int,
    *,
    size: int = 20,
    pieces: int = 6,
    seed: int = 0,
) -> DigitCanvases:
    """One whole digit anywhere on a square canvas, over `pieces` pieces of 4 x 4 pixels cut from other digits."""
    if size < DIGIT or count < 1 or pieces < 0:
        raise ValueError(f"cluttered_digits: count {count}, size {size}, pieces {pieces}; a digit is {DIGIT} pixels")
    rng = torch.Generator().manual_seed(seed)
    canvas, side = torch.zeros(count, size, size), torch.arange(4)
    each = torch.arange(count)[:, None, None]

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1, 1), generator=rng)

    for _ in range(pieces):
        source, y, x = draw(len(images)), draw(5), draw(5)
        piece = images[source, 0, y + side[:, None], x + side]
        canvas[each, draw(size - 3) + side[:, None], draw(size - 3) + side] = piece
    chosen, y, x = draw(len(images))[:, 0, 0], draw(size - DIGIT + 1), draw(size - DIGIT + 1)
    span = torch.arange(DIGIT)
    canvas[each, y + span[:, None], x + span] = images[chosen, 0]
    return DigitCanvases(canvas[:, None], labels[chosen], torch.stack([y[:, 0, 0], x[:, 0, 0]], 1))
