"""What every probe must pass; found by what `attend` and `heads` export."""

import re

import pytest
import torch
from tests.contracts.discovery import exported
from tests.contracts.models_under_test import HEADS, LAYERS, left_padded, text, tiny_llama

from headwise.attend.read import Probe
from headwise.heads.prompt_probe import PromptProbe
from headwise.heads.vision_tokens import VisionTokenScores
from headwise.hf.session import probe

OF_EDITS = (VisionTokenScores,)  # read a vision tower for an edit, which makes them
PROBES = [
    cls
    for area in ("attend", "heads")
    for cls in exported(area, Probe, abstract=OF_EDITS)
    if getattr(cls, "kind", "") == "text"
]
PROMPTS = exported("heads", PromptProbe)


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(params=PROBES, ids=lambda cls: cls.name or cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[Probe]:
    return request.param


def scores(cls: type[Probe], model, runs: list[dict[str, torch.Tensor]], **options) -> torch.Tensor:
    """`[l h]` of the main tower over some forwards."""
    with torch.no_grad(), probe(model, seen := cls(**options)):
        for inputs in runs:
            model(**inputs)
    found = seen.scores()
    return torch.stack([found["", layer] for layer in range(LAYERS)])


def test_names_are_unique():
    names = [cls.name for cls in [*PROBES, *PROMPTS]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("named", [*PROBES, *PROMPTS], ids=lambda cls: cls.name or cls.__name__)
def test_it_says_what_it_is(named: type[Probe] | type[PromptProbe]):
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", named.name), named.name
    assert named.sentence.endswith("."), "one sentence for a person"
    assert len(named.sentence) < 200


def test_reading_changes_nothing(cls: type[Probe], model):
    ids = text()
    with torch.no_grad():
        before = model(ids).logits
        with probe(model, cls()):
            inside = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, inside)
    assert torch.equal(before, after)


def test_there_is_a_score_for_every_head(cls: type[Probe], model):
    found = scores(cls, model, [{"input_ids": text(2, 24)}])
    assert found.shape == (LAYERS, HEADS)
    assert torch.isfinite(found).all()
    least, greatest = getattr(cls, "range", (0.0, float("inf")))
    assert (found >= least - 1e-6).all()
    assert (found <= greatest + 1e-6).all()


def test_texts_may_come_together_or_apart(cls: type[Probe], model):
    ids = text(3, 13)
    together = scores(cls, model, [{"input_ids": ids}])
    apart = scores(cls, model, [{"input_ids": row[None]} for row in ids])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_left_padding_changes_nothing(cls: type[Probe], model):
    rows = [text(1, 13)[0], text(1, 8, seed=1)[0]]
    padded = scores(cls, model, [left_padded(rows)])
    apart = scores(cls, model, [{"input_ids": row[None]} for row in rows])
    torch.testing.assert_close(padded, apart, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near_float32(cls: type[Probe], model):
    ids = text(2, 24)
    found = scores(cls, model, [{"input_ids": ids}])
    low = scores(cls, model.bfloat16(), [{"input_ids": ids}])
    torch.testing.assert_close(low, found, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("named", PROMPTS, ids=lambda cls: cls.name)
def test_a_prompt_probe_repeats_and_stays_in_range(named: type[PromptProbe]):
    from headwise.specimens.registry import load_specimen

    specimen = load_specimen("planted")
    first = named().measure(specimen.model, specimen.tokenizer, seed=3).tensor(named.name)
    again = named().measure(specimen.model, specimen.tokenizer, seed=3).tensor(named.name)
    torch.testing.assert_close(first, again, equal_nan=True)
    assert ((first >= 0) & (first <= 1) | first.isnan()).all()
    assert first.nan_to_num().max() >= 0.9, "the planted copying head is not found"
