"""Scenes whose coarse tokens hide a digit: what can be read from where."""

import pytest
import torch

from headwise.tasks.coarse_to_fine import (
    ASK_DIGIT,
    BOS,
    DIGITS,
    FIRST_COLOUR,
    FIRST_DIGIT,
    FIRST_KIND,
    SCENE,
    VOCABULARY,
    coarse_to_fine_scene,
)


def readable(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of a linear reader, trained on one half of the rows."""
    half = len(features) // 2
    ones = torch.cat([features, torch.ones(len(features), 1)], 1)
    target = torch.nn.functional.one_hot(labels).float()
    weight = torch.linalg.lstsq(ones[:half], target[:half]).solution
    return float(((ones[half:] @ weight).argmax(-1) == labels[half:]).double().mean())


def test_digits_are_in_the_cells_and_not_in_the_coarse_tokens():
    data = coarse_to_fine_scene(400, seed=0)
    coarse = data.coarse.flatten(0, 1)
    assert readable(coarse, data.colour.flatten()) > 0.9 and readable(coarse, data.kind.flatten()) > 0.9
    assert readable(coarse, data.digit.flatten()) < 0.25
    cells = data.fine.view(400, 16, 4, -1).gather(2, data.cell[..., None, None].expand(-1, -1, 1, 30)).flatten(0, 2)
    assert readable(cells, data.digit.flatten()) > 0.99
    whole = data.fine.view(400, 16, 4, -1).mean(2).flatten(0, 1)
    assert readable(whole, data.digit.flatten()) > 0.9  # what hides it is the noise of the coarse token


def test_questions_have_one_answer():
    data = coarse_to_fine_scene(300, regions=5, details=0.5, seed=1)
    assert data.ids.shape == (300, 8) and int(data.ids.max()) < VOCABULARY and len(data[:7]) == 7
    assert bool((data.ids[:, 0] == BOS).all()) and bool((data.ids[:, 1:6] == SCENE).all())
    for row in range(300):
        place = int((data.colour[row] == data.ids[row, -1] - FIRST_COLOUR).nonzero())
        assert place == data.asked[row]
        wanted = FIRST_DIGIT + data.digit[row, place] if data.detail[row] else FIRST_KIND + data.kind[row, place]
        assert data.answer[row] == wanted and (data.ids[row, -2] == ASK_DIGIT) == bool(data.detail[row])
    assert 0.4 < data.detail.double().mean() < 0.6
    assert len(data.digit.unique()) == DIGITS and data.cell.unique().tolist() == [0, 1, 2, 3]


def test_the_same_scene_under_another_question():
    data = coarse_to_fine_scene(20, seed=2)
    region, detail = (data.asked + 1) % 16, torch.ones(20, dtype=torch.long)
    other = data.asking(region, detail)
    assert torch.equal(other.fine, data.fine) and torch.equal(other.asked, region)
    assert torch.equal(other.answer, FIRST_DIGIT + data.digit.gather(1, region[:, None])[:, 0])
    assert torch.equal(data.asking(data.asked, data.detail).ids, data.ids)


def test_a_seed_is_a_draw():
    one, same, other = (coarse_to_fine_scene(3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one.fine, same.fine) and not torch.equal(one.fine, other.fine)
    drawn = coarse_to_fine_scene(3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn.ids, one.ids)


def test_what_is_refused():
    with pytest.raises(ValueError, match="regions is 17; expected 2 to 16"):
        coarse_to_fine_scene(1, regions=17, seed=0)
    with pytest.raises(ValueError, match="cells is 1"):
        coarse_to_fine_scene(1, cells=1, seed=0)
    with pytest.raises(ValueError, match=r"details is 1\.5"):
        coarse_to_fine_scene(1, details=1.5, seed=0)
    with pytest.raises(ValueError, match="either a seed or a generator"):
        coarse_to_fine_scene(1)
