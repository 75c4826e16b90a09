"""Scenes of subjects, and scores of how alike their looks are: planted looks come out as they were planted."""

import pytest
import torch

from headwise.tasks.subject_consistency import (
    SUBJECT_SHAPES,
    SUBJECT_TEXTURES,
    colour_distance,
    colour_histogram,
    draw_subjects,
    histogram_overlap,
    mean_colours,
    patch_features,
    render_subjects,
    same_subject,
    subject_crops,
    subject_leakage,
)


def drawn(n: int = 64, **options):
    return draw_subjects(n, torch.Generator().manual_seed(3), **options)


def scene(hues: list[float], textures: list[int] | None = None, shapes: list[int] | None = None, size: int = 1):
    """One picture of subjects in cells 0, 1, 2..."""
    s = len(hues)
    whole = lambda values: torch.tensor([values])  # noqa: E731
    return render_subjects(
        whole(shapes or [0] * s), whole(list(range(s))), whole([size] * s), whole(hues), whole(textures or [0] * s)
    )


def test_scenes_are_what_they_say():
    made = drawn()
    count = (made.cells >= 0).sum(1)
    assert set(count.tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(made.masks.flatten(2).any(-1), made.cells >= 0)
    assert not (made.masks & ~made.boxes).any() and int(made.boxes.sum(1).max()) == 1, "boxes do not touch"
    for i, j in (made.cells >= 0).nonzero().tolist():
        cell, box = int(made.cells[i, j]), made.boxes[i, j].nonzero()
        side = (4, 6)[int(made.sizes[i, j])]
        assert len(box) == side * side and box[0].tolist() == [cell // 3 * 6, cell % 3 * 6]
    ground = made.images.masked_select(~made.masks.any(1)[:, None].expand_as(made.images))
    assert float(ground.min()) >= -0.9 and float(ground.max()) <= -0.5
    again = drawn()
    assert torch.equal(made.images, again.images) and torch.equal(made.hues, again.hues)


def test_a_share_of_scenes_has_one_look():
    made = drawn(400, subjects=(2, 2), shared=0.3)
    alike = (made.hues[:, 0] == made.hues[:, 1]) & (made.textures[:, 0] == made.textures[:, 1])
    assert 0.2 < float(alike.double().mean()) < 0.4
    assert not (drawn(shared=0.0).hues[:, 0] == drawn(shared=0.0).hues[:, 1]).any()
    assert bool((drawn(shared=1.0).hues == drawn(shared=1.0).hues[:, :1]).all())


@pytest.mark.parametrize("size", [0, 1])
def test_shapes_and_textures_can_be_told_apart(size):
    masks = [scene([0.1], shapes=[shape], size=size).masks for shape in range(len(SUBJECT_SHAPES))]
    assert all(not torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))
    found = [scene([0.0], [texture], size=size) for texture in range(len(SUBJECT_TEXTURES))]
    details = [patch_features(one.images, one.masks)[0, 0, 3:].view(3, 3)[:, 0] for one in found]  # red channel
    assert not details[0].any()
    for texture, which in ((1, 0), (2, 1), (3, 2)):  # rows, columns, checks
        assert int(details[texture].argmax()) == which and float(details[texture].sum()) > 0.2
        assert float(details[texture][which]) == pytest.approx(float(details[texture].sum()), abs=1e-6)


def test_histograms_by_hand():
    images = torch.full((1, 3, 2, 2), -1.0)
    images[0, 0, 0] = 1.0  # the first row is red, the second black
    masks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    found = colour_histogram(images, masks, bins=3)[0, 0].view(3, 3, 3)
    assert float(found[2, 0, 0]) == 0.5 and float(found[0, 0, 0]) == 0.5
    between = colour_histogram(torch.full((1, 3, 1, 1), -0.75), masks[..., :1, :1], bins=3)[0, 0].view(3, 3, 3)
    assert float(between[0, 0, 0]) == pytest.approx(0.75**3) and float(between[1, 1, 0]) == pytest.approx(
        0.25**2 * 0.75
    )
    assert not colour_histogram(images, masks & False).any()
    made = drawn(8)
    total = colour_histogram(3 * made.images, made.masks).sum(-1)
    torch.testing.assert_close(total, (made.cells >= 0).float())
    with pytest.raises(ValueError, match="bins is 1; expected 2 or more"):
        colour_histogram(images, masks, bins=1)


def test_overlap_is_one_for_the_same_and_none_for_disjoint_colours():
    one, other = scene([0.0]), scene([0.5])
    a, b = (colour_histogram(x.images, x.masks) for x in (one, other))
    assert float(histogram_overlap(a, a)) == pytest.approx(1) and float(histogram_overlap(a, b)) < 0.05
    near = scene([0.02])
    assert 0.5 < float(histogram_overlap(a, colour_histogram(near.images, near.masks))) < 1


@pytest.mark.parametrize("features", [None, patch_features])
def test_planted_looks_are_found_on_the_diagonal(features):
    looks, places = [0.05, 0.35, 0.7], [1, 2, 3]
    target = scene(looks, places)
    references = [scene([hue], [texture], shapes=[2]) for hue, texture in zip(looks, places, strict=True)]
    pictures = torch.cat([one.images for one in references])[None]
    inside = torch.cat([one.masks[:, 0] for one in references])[None]
    found = same_subject(target.images, target.masks, pictures, inside, features=features)
    assert found.shape == (1, 3, 3)
    assert found[0].argmax(1).tolist() == [0, 1, 2] and float(found[0].diagonal().min()) > 0.8
    fused = scene([0.05] * 3, [1] * 3)
    leaked = same_subject(fused.images, fused.masks, pictures, inside, features=features)
    assert float(subject_leakage(leaked)) > float(subject_leakage(found))
    assert float(subject_leakage(found)) == pytest.approx(float((found.sum() - found[0].trace()) / 6), abs=1e-5)


def test_fused_subjects_are_near_each_other_in_colour():
    apart, fused = scene([0.0, 0.5]), scene([0.3, 0.3])
    assert float(colour_distance(fused.images, fused.masks)) == pytest.approx(0, abs=1e-6)
    colours = mean_colours(apart.images, apart.masks)[0]
    expected = float((colours[0] - colours[1]).norm())
    assert float(colour_distance(apart.images, apart.masks)) == pytest.approx(expected) and expected > 2
    with pytest.raises(ValueError, match="masks has 1 subjects; expected 2 or more"):
        colour_distance(apart.images, apart.masks[:, :1])


def test_crops_are_what_an_encoder_is_given():
    made = scene([0.0, 0.5], shapes=[0, 2])
    crops = subject_crops(made.images, made.masks, size=6, ground=0.25)
    assert crops.shape == (1, 2, 3, 6, 6)
    torch.testing.assert_close(crops[0, 0], made.images[0, :, :6, :6])
    inside = made.masks[0, 1, :6, 6:12]
    assert bool((crops[0, 1][:, ~inside] == 0.25).all()) and not bool((crops[0, 1][:, inside] == 0.25).any())
    with pytest.raises(ValueError, match="1 masks are empty; leave them out"):
        subject_crops(made.images, made.masks & torch.tensor([True, False])[:, None, None])


def test_what_is_refused():
    generator = torch.Generator()
    for subjects in ((0, 2), (3, 2), (2, 6)):
        with pytest.raises(ValueError, match="expected 1 <= least <= greatest <= 5"):
            draw_subjects(2, generator, subjects=subjects)
    with pytest.raises(ValueError, match=r"shared is 1\.5"):
        draw_subjects(2, generator, shared=1.5)
    with pytest.raises(ValueError, match=r"expected \[n, s, s\], s >= 2"):
        subject_leakage(torch.zeros(2, 1, 1))
