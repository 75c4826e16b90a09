"""Scenes: exact masks, the same scenes for the same seed, motion in closed form."""

import math

import pytest
import torch
from torch.nn.functional import avg_pool2d, grid_sample

from headwise.tasks.scene_shapes import SHAPES, coverage, hsv_to_rgb, object_frame
from headwise.tasks.scenes import SceneStream, object_scenes


@pytest.mark.parametrize("style", ["plain", "textured", "two_tone"])
def test_masks_share_out_every_pixel(style):
    made = object_scenes(12, size=32, frames=2, style=style, seed=1)
    assert made.masks.min() >= 0
    torch.testing.assert_close(made.masks.sum(2), torch.ones(12, 2, 32, 32), atol=1e-6, rtol=0)
    assert torch.equal(made.labels, made.masks.argmax(2))
    assert made.image.min() >= 0 and made.image.max() <= 1
    count = made.present.sum(1)
    assert count.min() >= 2 and count.max() <= 4
    assert not made.masks[:, :, 1:][~made.present[:, None].expand(-1, 2, -1)].any()


def test_an_item_depends_on_the_seed_and_its_number_alone():
    whole, part = object_scenes(9, size=24, seed=5), object_scenes(3, size=24, seed=5, start=4)
    assert torch.equal(whole.image[4:7], part.image) and torch.equal(whole.masks[4:7], part.masks)
    assert not torch.equal(whole.image, object_scenes(9, size=24, seed=6).image)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_share_out_the_same_scenes(workers):
    stream = SceneStream(block=4, size=16, scale=(0.15, 0.2), seed=2)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    images = [item["image"] for item, _ in zip(loader, range(9), strict=False)]
    expected = object_scenes(9, size=16, scale=(0.15, 0.2), seed=2).image
    order = sorted(range(9), key=lambda i: images[i].sum().item())
    wanted = sorted(range(9), key=lambda i: expected[i].sum().item())
    assert all(torch.equal(images[i], expected[j]) for i, j in zip(order, wanted, strict=True))


def test_enough_of_every_object_shows():
    made = object_scenes(300, size=32, max_objects=6, seed=0)
    assert made.visible[:, 0][made.present].min() >= 0.25


def test_a_disc_has_its_area_whatever_its_place():
    axis = (torch.arange(64) + 0.5) / 64
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    center, angle, scale = torch.rand(5, 1, 1, 2) * 0.4 + 0.3, torch.rand(5, 1, 1), torch.full((5, 1, 1), 0.2)
    disc = torch.zeros(5, 1, 1, dtype=torch.long)
    area = coverage(disc, object_frame(points, center, angle, scale), scale * 64).sum((-1, -2)) / 64**2
    torch.testing.assert_close(area, torch.full_like(area, math.pi * 0.04), rtol=0.02, atol=0)


def test_finer_rendering_and_averaging_gives_the_same():
    # plain colours: a texture of one size below the pixels of the other is not the same picture
    low, high = (object_scenes(40, size=size, style="plain", scale=(0.2, 0.24), seed=3) for size in (32, 64))
    difference = (avg_pool2d(high.image[:, 0], 2) - low.image[:, 0]).abs().mean()
    assert difference < 0.02
    assert (avg_pool2d(high.masks[:, 0], 2) - low.masks[:, 0]).abs().mean() < 0.02


def test_flow_carries_each_frame_to_the_next():
    made = object_scenes(20, size=48, frames=3, style="plain", background="grey", camera=0.02, seed=4)
    axis = (torch.arange(48) + 0.5) / 48
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    assert made.flow.abs().max() > 1
    for t in range(2):
        there = 2 * (points + made.flow[:, t].permute(0, 2, 3, 1) / 48) - 1
        moved = grid_sample(made.masks[:, t + 1, :], there, align_corners=False)
        label = made.labels[:, t][:, None]
        inside = made.masks[:, t].amax(1) > 0.999  # borders move by parts of a pixel
        inside &= (there.abs() < 0.95).all(-1)
        kept = moved.gather(1, label)[:, 0][inside]
        # what another object covers next is not there any more: an object in front has no such pixels
        front = (made.depth[:, None] == 0) & made.present[:, None]
        front_label = torch.cat([torch.zeros_like(front[..., :1]), front], -1)
        of_front = front_label[:, 0].gather(1, made.labels[:, t].flatten(1)).view_as(made.labels[:, t])[inside]
        assert kept[of_front].mean() > 0.98 and kept.mean() > 0.95


def test_what_is_in_front_hides_what_is_behind():
    made = object_scenes(200, size=32, min_objects=4, seed=6)
    solid = made.visible[:, 0] > 0.999
    front = made.depth == 0
    assert solid[front].all()
    assert not solid[~front].all()


def test_looks_come_in_classes():
    made = object_scenes(60, size=24, same_looks=3, seed=1)
    looks = torch.stack([part[made.present].float() for part in (made.shape, made.texture, made.hue, made.hue2)], 1)
    assert len(looks.unique(dim=0)) == 3


def test_colours_are_those_of_the_standard_library():
    import colorsys

    hue = torch.linspace(0, 0.99, 23)
    expected = torch.tensor([colorsys.hsv_to_rgb(float(h), 0.85, 0.9) for h in hue])
    torch.testing.assert_close(hsv_to_rgb(hue, 0.85, 0.9), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_objects": 5}, "max_objects is 4"),
        ({"size": 16, "scale": (0.1, 0.2)}, "radius of 1.6"),
        ({"frames": 0}, "frames is 0"),
        ({"scale": (0.2, 0.5)}, "scale is"),
        ({"shapes": ["disk"]}, "'disk'; there are disc"),
        ({"style": "two-tone"}, "choose plain"),
        ({"background": "white"}, "choose black"),
        ({"same_looks": 0}, "same_looks is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        object_scenes(1, **options)


def test_every_shape_is_drawn_about_its_centre():
    axis = torch.linspace(-1.4, 1.4, 141)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None, None, None]
    radius = torch.full((1, 1, 1), 50.0)
    for number in range(len(SHAPES)):
        inside = coverage(torch.full((1, 1, 1), number), grid, radius)[0, 0, 0]
        assert 0.1 < inside.mean() < 0.5
        assert inside[0].max() == inside[-1].max() == inside[:, 0].max() == inside[:, -1].max() == 0
