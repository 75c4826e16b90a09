"""Pictures of shapes: what is drawn is what is said, and the prior is where it should be."""

import pytest
import torch

from headwise.tasks.captions import QUESTION_KINDS, SHAPE_WORDS, glyphs, popularity, shapes_captions


def test_a_picture_without_noise_is_read_off_cell_by_cell():
    scenes = shapes_captions(40, sigma=0.0, seed=3)
    cells = scenes.pixel_values[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).reshape(40, 16, 8, 8)
    filled = cells.flatten(2).sum(2) > 1
    assert torch.equal(filled.nonzero()[:, 1].view(40, 4), scenes.cells), "the cells, in reading order"
    drawn = cells[filled].view(40, 4, 1, 8, 8)
    found = (drawn - glyphs()).abs().flatten(3).sum(3)
    assert torch.equal(found.argmin(2), scenes.shapes) and found.min(2).values.max() < 1e-3
    assert torch.equal(scenes.pixel_values[:, 0], scenes.pixel_values[:, 2])


def test_noise_has_its_size_and_the_picture_its_range():
    quiet, loud = (shapes_captions(200, sigma=sigma, seed=0).pixel_values[:, 0] for sigma in (0.0, 1.2))
    assert (loud - quiet).std().item() == pytest.approx(1.2, abs=0.02)
    image = shapes_captions(50, sigma=9.0, seed=0).image
    assert image.min() == 0 and image.max() == 1


def test_successors_are_typical_or_never_are():
    ordinary, other = (shapes_captions(4000, counterfactual=flag, seed=5) for flag in (False, True))
    follows = (ordinary.shapes[:, 1:] == ordinary.typical[:, :-1]).float().mean().item()
    assert follows == pytest.approx(0.9 + 0.1 / 8, abs=0.01)
    steps = (other.shapes[:, 1:] - other.shapes[:, :-1]) % 8
    assert not (steps == 1).any() and set(steps.unique().tolist()) == {0, 2, 3, 4, 5, 6, 7}
    even = shapes_captions(4000, prior=0.0, seed=5)
    assert (even.shapes[:, 1:] == even.typical[:, :-1]).float().mean().item() == pytest.approx(1 / 8, abs=0.01)


def test_popularity_is_what_is_drawn():
    counted = shapes_captions(8000, prior=1.0, seed=1).present.float().mean(0)
    torch.testing.assert_close(counted, popularity(), atol=0.02, rtol=0)


def test_questions_ask_for_what_their_kind_says():
    scenes = shapes_captions(300, seed=2)
    generator = torch.Generator().manual_seed(0)
    here = scenes.present
    rows = torch.arange(300)
    yes = scenes.questions(None, generator)
    assert yes.answer.all() and here[rows, yes.shape].all()
    for kind in QUESTION_KINDS:
        asked = scenes.questions(kind, generator)
        assert not asked.answer.any() and not here[rows, asked.shape].any(), kind
        if kind == "popular":
            rates = torch.where(here, -1.0, popularity())
            assert torch.equal(rates[rows, asked.shape], rates.max(1).values)
        if kind == "adversarial":
            assert here[rows, (asked.shape - 1) % 8].all(), "what goes before it is there"
    assert yes.texts()[0] == f"is there a {SHAPE_WORDS[int(yes.shape[0])]} ?"


def test_captions_and_objects_say_the_same():
    scenes = shapes_captions(30, seed=4)
    assert [set(text.split(" , ")) for text in scenes.captions()] == scenes.objects()
    assert scenes[3:5].captions() == scenes.captions()[3:5]


def test_cells_can_be_kept_empty_and_seeds_repeat():
    scenes = shapes_captions(500, empty=(5, 10), seed=0)
    assert set(scenes.cells.unique().tolist()) == set(range(16)) - {5, 10}
    again = shapes_captions(500, empty=(5, 10), seed=0)
    assert torch.equal(again.image, scenes.image) and torch.equal(again.shapes, scenes.shapes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0, "seed": 0}, "n is 0"),
        ({"n": 1, "seed": 0, "sigma": -1.0}, "sigma is -1.0"),
        ({"n": 1, "seed": 0, "sigma": float("nan")}, "sigma is nan"),
        ({"n": 1, "seed": 0, "prior": 1.5}, "prior is 1.5"),
        ({"n": 1}, "either seed or generator"),
        ({"n": 1, "seed": 0, "generator": torch.Generator()}, "either seed or generator"),
        ({"n": 1, "seed": 0, "empty": (16,)}, "empty is"),
        ({"n": 1, "seed": 0, "empty": tuple(range(13))}, "empty is"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        shapes_captions(**options)


def test_unknown_kinds_of_questions_are_refused():
    with pytest.raises(ValueError, match="'unlikely'"):
        shapes_captions(1, seed=0).questions("unlikely", torch.Generator())
