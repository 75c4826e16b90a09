"""Image tokens are found, and prompts get a twin without them."""

import pytest
import torch
from tests.zoo import FAMILIES, families

from headwise.errors import UnsupportedModel
from headwise.hf.images import image_positions, without

LENGTH = 20
VISUAL = families(kind="multimodal")


def pair(name, **options):
    model = FAMILIES[name].build()
    return model, FAMILIES[name].inputs(model, length=LENGTH, **options)


@pytest.mark.parametrize("name", VISUAL)
def test_positions_are_those_of_the_picture(name):
    model, inputs = pair(name)
    found = image_positions(model, inputs)
    assert found.sum(1).tolist() == [FAMILIES[name].image_tokens] * 2
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    stream = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: stream.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        model(**other)
    hook.remove()
    assert torch.equal((stream[0] != stream[1]).any(-1), found), "what the picture changes is what is marked"


@pytest.mark.parametrize("name", VISUAL)
def test_a_dropped_picture_is_the_prompt_without_it(name):
    model, inputs = pair(name)
    found = image_positions(model, inputs)
    twin = without(inputs, found, model=model)
    assert not [key for key in twin if key.startswith(("pixel", "image_"))]
    assert torch.equal(twin["input_ids"], inputs["input_ids"][~found].view(2, -1))
    with torch.no_grad():
        dropped = model(**twin).logits
        plain = model(input_ids=twin["input_ids"]).logits
    torch.testing.assert_close(dropped, plain)


@pytest.mark.parametrize("name", VISUAL)
def test_blank_and_swapped_pictures(name):
    model, inputs = pair(name)
    found = image_positions(model, inputs)
    blank = without(inputs, found, "blank", model=model)
    assert torch.equal(blank["input_ids"], inputs["input_ids"]) and not blank["pixel_values"].any()
    swapped = without(inputs, found, "swap", model=model)
    assert torch.equal(without(swapped, found, "swap", model=model)["pixel_values"], inputs["pixel_values"])
    first = FAMILIES[name].inputs(model, batch=2, length=LENGTH)
    half = len(first["pixel_values"]) // 2
    assert torch.equal(swapped["pixel_values"][:half], inputs["pixel_values"][half:])
    with torch.no_grad():
        model(**blank)
        model(**swapped)


def test_rows_that_get_shorter_are_padded_on_the_left():
    model, inputs = pair("llama")
    group = torch.zeros(2, LENGTH, dtype=torch.bool)
    group[0, 3:6] = group[1, 4] = True
    twin = without(inputs, group)
    assert twin["input_ids"].shape == (2, 19)
    assert twin["attention_mask"].sum(1).tolist() == [17, 19]
    with torch.no_grad():
        alone = model(input_ids=inputs["input_ids"][:1, ~group[0]]).logits
        positions = (twin["attention_mask"].cumsum(1) - 1).clamp(min=0)
        padded = model(**twin, position_ids=positions).logits
    torch.testing.assert_close(padded[:1, 2:], alone, rtol=1e-4, atol=1e-4)


def test_blank_words_are_seen_by_nobody():
    model, inputs = pair("gpt2")
    group = torch.zeros(2, LENGTH, dtype=torch.bool)
    group[:, 5:8] = True
    twin = without(inputs, group, "blank")
    other = {**twin, "input_ids": twin["input_ids"].masked_fill(group, 9)}
    with torch.no_grad():
        left, right = model(**twin).logits, model(**other).logits
    torch.testing.assert_close(left[~group], right[~group])
    assert torch.equal(inputs["input_ids"], twin["input_ids"])


def test_swapped_words_come_from_the_next_row():
    _, inputs = pair("llama", batch=3)
    group = torch.zeros(3, LENGTH, dtype=torch.bool)
    group[0, 2:4] = group[1, 5:7] = group[2, 9:11] = True
    twin = without(inputs, group, "swap")["input_ids"]
    assert torch.equal(twin[0, 2:4], inputs["input_ids"][1, 5:7])
    assert torch.equal(twin[2, 9:11], inputs["input_ids"][0, 2:4])
    assert torch.equal(twin[~group], inputs["input_ids"][~group])


def test_what_cannot_be_done_says_why():
    model, inputs = pair("llava")
    found = image_positions(model, inputs)
    with pytest.raises(ValueError, match="how is 'hide'"):
        without(inputs, found, "hide", model=model)
    with pytest.raises(ValueError, match="give model= too"):
        without(inputs, found)
    part = found.clone()
    part[0] = False
    with pytest.raises(ValueError, match="group holds 4 of 8 image tokens"):
        without(inputs, part, model=model)
    with pytest.raises(ValueError, match=r"group has shape \(2, 5\) but input_ids has \(2, 20\)"):
        without(inputs, found[:, :5], model=model)
    with pytest.raises(ValueError, match="a whole row"):
        without({"input_ids": inputs["input_ids"]}, torch.ones(2, LENGTH, dtype=torch.bool))
    single = {key: value[:1] for key, value in inputs.items()}
    with pytest.raises(ValueError, match="the batch has one row"):
        without(single, found[:1], "swap", model=model)
    with pytest.raises(ValueError, match="none of the 20 tokens is the image token 3"):
        image_positions(model, {"input_ids": inputs["input_ids"].clamp(min=8)})
    with pytest.raises(ValueError, match="no input_ids"):
        image_positions(model, {})
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: its config names no image token"):
        image_positions(FAMILIES["llama"].build(), inputs)
    uneven = torch.zeros(2, LENGTH, dtype=torch.bool)
    uneven[0, :2] = uneven[1, 0] = True
    with pytest.raises(ValueError, match=r"rows have \[2, 1\] tokens"):
        without({"input_ids": inputs["input_ids"]}, uneven, "swap")
