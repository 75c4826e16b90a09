"""Vision-aware heads: the divergence against two separate runs, the rule that chooses, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.zoo import FAMILIES, families

from headwise.attend.addresses import Head
from headwise.attend.probes import HeadOutputs
from headwise.heads.vision import aware_heads, context_divergence, token_divergence, vision_divergence
from headwise.hf.images import image_positions, without
from headwise.hf.session import probe
from headwise.specimens.registry import load_specimen
from headwise.specimens.vision_language import vision_language_inputs
from headwise.tasks.captions import shapes_captions

VISUAL = families(kind="multimodal")
LENGTH = 24


def pair(name, **options):
    model = FAMILIES[name].build()
    return model, FAMILIES[name].inputs(model, length=LENGTH, **options)


def last_outputs(model, inputs):
    """`[b l h e]` of the last row of every layer, read one row of the batch at a time."""
    with torch.no_grad(), probe(model, seen := HeadOutputs()):
        model(**inputs)
    return torch.stack([seen.values["", layer][:, -1] for layer in range(2)], 1)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", VISUAL)
def test_it_is_the_norm_of_a_difference_of_two_runs(name, together):
    model, inputs = pair(name)
    found = vision_divergence(model, inputs, together=together)
    images = image_positions(model, inputs)
    there = last_outputs(model, inputs)
    gone = last_outputs(model, {"input_ids": inputs["input_ids"][~images].view(2, -1)})
    torch.testing.assert_close(found.divergence, (there - gone).norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.present, there.norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.absent, gone.norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.relative, found.divergence / found.present)
    assert found.divergence.min() > 0 and found.divergence.shape == (2, 2, 4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_padding_on_the_left_changes_nothing(name):
    model, inputs = pair(name)
    found = vision_divergence(model, inputs).divergence
    moved = {
        key: torch.nn.functional.pad(value, (5, 0)) if value.shape[:2] == (2, LENGTH) else value
        for key, value in inputs.items()
    }
    moved["attention_mask"] = torch.nn.functional.pad(torch.ones(2, LENGTH, dtype=torch.long), (5, 0))
    for together in (True, False):
        padded = vision_divergence(model, moved, together=together).divergence
        torch.testing.assert_close(padded, found, atol=1e-5, rtol=1e-4)


def test_several_positions_are_those_of_the_words_of_a_caption():
    model, inputs = pair("llava")
    found = vision_divergence(model, inputs, [-1, -3])
    assert found.divergence.shape == (2, 2, 2, 4)
    torch.testing.assert_close(found.divergence[:, 0], vision_divergence(model, inputs).divergence)
    shorter = {key: value[:, :-2] if value.shape[:2] == (2, LENGTH) else value for key, value in inputs.items()}
    torch.testing.assert_close(
        found.divergence[:, 1], vision_divergence(model, shorter).divergence, atol=1e-5, rtol=1e-4
    )


def test_it_is_zero_where_nothing_is_taken_away():
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    for together in (True, False):
        found = context_divergence(model, ids, {"input_ids": ids}, together=together)
        assert found.divergence.abs().max() < 1e-5
    assert not context_divergence(model, ids, ids, together=False).divergence.any(), "two equal forwards are equal"


def test_any_part_of_a_prompt_can_be_taken_away_from_a_model_with_learned_positions():
    model = FAMILIES["gpt2"].build()
    ids = FAMILIES["gpt2"].inputs(model, length=LENGTH)["input_ids"]
    group = torch.zeros_like(ids, dtype=torch.bool)
    group[0, 3:9] = group[1, 5:7] = True
    twin = without({"input_ids": ids}, group)
    found = context_divergence(model, ids, twin)
    there = last_outputs(model, {"input_ids": ids})
    for row in range(2):
        gone = last_outputs(model, {"input_ids": ids[row : row + 1, ~group[row]]})
        torch.testing.assert_close(found.divergence[row], (there[row] - gone[0]).norm(dim=-1), atol=1e-5, rtol=1e-4)


def test_a_blank_picture_is_another_question_than_none():
    model = load_specimen("vision-language").model
    inputs = vision_language_inputs(shapes_captions(8, seed=0))
    dropped, blank = (vision_divergence(model, inputs, counterfactual=how) for how in ("drop", "blank"))
    assert not torch.allclose(dropped.divergence, blank.divergence, rtol=0.1)
    assert blank.divergence.min() >= 0


def test_a_map_ranks_heads_by_their_mean():
    model = load_specimen("vision-language").model
    found = vision_divergence(model, vision_language_inputs(shapes_captions(16, seed=0)))
    table = found.map(model)
    mean = found.divergence.mean(0)
    best = int(mean.argmax())
    assert table.top("vision-divergence", 1) == [Head(best // 8, best % 8)]
    assert len(table.runs["vision-divergence"]) == 16
    torch.testing.assert_close(table.tensor("vision-divergence").float(), mean)
    other = found.map(model, name="relative", relative=True)
    assert other.top("relative", 1) != table.top("vision-divergence", 1) or torch.equal(found.relative, mean)


# The rule


@given(st.integers(1, 12), st.integers(0, 30))
def test_the_upper_half_is_kept(heads, seed):
    values = torch.randperm(heads, generator=torch.Generator().manual_seed(seed)).float()
    chosen = aware_heads(values, torch.zeros(heads))
    assert int(chosen.sum()) == heads // 2
    if heads > 1:
        assert values[chosen].min() > values[~chosen].max()


def test_ties_at_the_median_are_not_chosen():
    assert aware_heads(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.zeros(4)).tolist() == [False] * 4
    assert aware_heads(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.zeros(4)).tolist() == [False, False, False, True]
    assert aware_heads(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3)).tolist() == [False] * 3
    assert aware_heads(torch.tensor([float("nan"), 1.0, 2.0]), torch.zeros(3)).tolist()[0] is False


def test_a_head_that_surges_without_the_picture_counts_as_nothing():
    divergence = torch.tensor([9.0, 1.0, 1.2, 1.4, 1.6, 1.8])
    quiet, loud = torch.ones(6), torch.tensor([50.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    kept = aware_heads(divergence, quiet)
    assert kept.tolist() == [True, False, False, False, True, True]
    assert aware_heads(divergence, loud).tolist() == [False, False, False, True, True, True]
    assert torch.equal(aware_heads(divergence, loud, drop_outliers=False), kept)
    elsewhere = loud.roll(1)
    assert torch.equal(aware_heads(divergence, elsewhere), kept), "both must be large in the same head"


def test_a_token_owes_the_sum_of_the_largest_of_each_layer():
    divergence = torch.tensor([[[1.0, 5.0, 3.0], [2.0, float("nan"), 4.0]]])
    assert token_divergence(divergence).tolist() == [5 + 3 + 4 + 2]
    assert token_divergence(divergence, 1).tolist() == [5 + 4]
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 3"):
            token_divergence(divergence, k)


# Bad input


def test_what_cannot_be_measured_says_why():
    model, inputs = pair("llava")
    with pytest.raises(ValueError, match="none of the 24 tokens is the image token"):
        vision_divergence(model, {"input_ids": inputs["input_ids"].clamp(min=8)})
    ends = {**inputs, "input_ids": inputs["input_ids"].roll(3, 1)}
    with pytest.raises(ValueError, match="ends inside the picture"):
        vision_divergence(model, ends)
    with pytest.raises(ValueError, match="counterfactual is 'swap'"):
        vision_divergence(model, inputs, counterfactual="swap")
    for position in (0, -21):
        with pytest.raises(ValueError, match=f"position is {position}; count from the end, -1 to -20"):
            vision_divergence(model, inputs, position)
    right = {**inputs, "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}
    right["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="padded on the right"):
        vision_divergence(model, right)
    with pytest.raises(ValueError, match="2 rows with the context but 1 without"):
        context_divergence(model, inputs, {"input_ids": inputs["input_ids"][:1]})
