"""One split for everybody."""

import pytest
import torch

from headwise.tasks.digits import digit_batches, digit_images


def test_the_test_images_are_always_the_same_and_never_trained_on():
    small, large = digit_images(200), digit_images(1200)
    assert torch.equal(small.test_images, large.test_images) and len(small.test_labels) == 597
    assert torch.equal(small.images, large.images[:200])
    seen = {image.numpy().tobytes() for image in large.images}
    assert sum(image.numpy().tobytes() in seen for image in large.test_images) == 0
    assert large.images.shape == (1200, 1, 8, 8) and large.images.max() == 1


def test_batches_repeat_with_their_generator():
    draw = digit_batches(digit_images(600), 8)
    one, two = (draw(0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="train is 1300; choose 200, 600, 1200"):
        digit_images(1300)
