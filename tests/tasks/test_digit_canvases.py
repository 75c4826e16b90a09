"""Canvases: what is drawn where, and that the label is the digit that counts."""

import pytest
import torch

from headwise.tasks.digit_canvases import cluttered_digits, marked_digits
from headwise.tasks.digits import digit_images


@pytest.fixture(scope="module")
def digits():
    return digit_images(200)


def names_of(patch, images, labels):
    return {int(label) for label, image in zip(labels, images[:, 0], strict=True) if torch.equal(image, patch)}


def test_the_bar_marks_the_band_of_the_label(digits):
    data = marked_digits(digits.images, digits.labels, 50, seed=1)
    assert data.images.shape == (50, 1, 24, 40)
    for image, label, (top, left) in zip(data.images[:, 0], data.labels, data.corners.tolist(), strict=True):
        bright = image[:, :2].sum(1).nonzero()[:, 0].tolist()
        assert bright == list(range(top + 2, top + 6)) and top % 8 == 0
        assert int(label) in names_of(image[top : top + 8, left : left + 8], digits.images, digits.labels)
        assert 18 <= left <= 32 and not image[:, 2:18].any()
    assert {top for top, _ in data.corners.tolist()} == {0, 8, 16}
    assert {left for _, left in data.corners.tolist()} >= {18, 32}


def test_every_band_has_a_digit(digits):
    data = marked_digits(digits.images, digits.labels, 20)
    assert all(image[top : top + 8, 18:].any() for image in data.images[:, 0] for top in (0, 8, 16))


def test_the_whole_digit_lies_on_top_of_the_clutter(digits):
    data = cluttered_digits(digits.images, digits.labels, 40, seed=2)
    assert data.images.shape == (40, 1, 20, 20)
    for image, label, (top, left) in zip(data.images[:, 0], data.labels, data.corners.tolist(), strict=True):
        assert int(label) in names_of(image[top : top + 8, left : left + 8], digits.images, digits.labels)
    bare = cluttered_digits(digits.images, digits.labels, 40, pieces=0)
    for image, (top, left) in zip(bare.images[:, 0], bare.corners.tolist(), strict=True):
        image[top : top + 8, left : left + 8] = 0
        assert not image.any()


def test_canvases_repeat_with_their_seed(digits):
    for make in (marked_digits, cluttered_digits):
        assert torch.equal(
            make(digits.images, digits.labels, 5, seed=3).images, make(digits.images, digits.labels, 5, seed=3).images
        )
        assert not torch.equal(
            make(digits.images, digits.labels, 5, seed=3).images, make(digits.images, digits.labels, 5, seed=4).images
        )


def test_refusals(digits):
    with pytest.raises(ValueError, match="nearest 33"):
        marked_digits(digits.images, digits.labels, 5, nearest=33)
    with pytest.raises(ValueError, match="count 0"):
        marked_digits(digits.images, digits.labels, 0)
    with pytest.raises(ValueError, match="size 7"):
        cluttered_digits(digits.images, digits.labels, 5, size=7)
