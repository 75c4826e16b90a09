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


def two_pictures(name, padded):
    """Two prompts, each with two pictures apart from each other; with padding, row i starts i + 1 tokens later."""
    family = FAMILIES[name]
    model, n, length = family.build(), family.image_tokens, 14 + 2 * family.image_tokens
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(8, 30, (2, length), generator=generator)
    image = model.config.image_token_id
    places = torch.zeros(2, length, dtype=torch.bool)
    for row in range(2):
        for start in (6 + row, 6 + row + n + 3):
            places[row, start : start + n] = True
            if name != "llava":  # Qwen's positions follow the marks around a picture
                ids[row, start - 1] = model.config.vision_start_token_id
                ids[row, start + n] = model.config.vision_end_token_id
    ids[places] = image
    inputs = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :1] = mask[1, :2] = 0
        inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name == "llava":
        inputs["pixel_values"] = torch.randn(4, 3, 16, 16, generator=generator)
    else:
        rows, columns = family.extras["grid"]
        inputs["pixel_values"] = torch.randn(4 * rows * columns, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, rows, columns]] * 4)
        inputs["mm_token_type_ids"] = (ids == image).long()
    return model, inputs, places


def first_stream(model, inputs):
    stream = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: stream.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return stream[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", VISUAL)
def test_several_pictures_in_a_prompt_with_and_without_padding(name, padded):
    model, inputs, places = two_pictures(name, padded)
    found = image_positions(model, inputs)
    assert torch.equal(found, places)
    changed = first_stream(model, inputs) != first_stream(
        model, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    )
    assert torch.equal(changed.any(-1), places), "what the pictures change is what is marked"
    twin = without(inputs, found, model=model)
    assert torch.equal(twin["input_ids"], inputs["input_ids"][~places].view(2, -1)), "all pictures go together"
    for row in range(2):  # the batch is its rows
        keep = ~places[row] if not padded else ~places[row] & inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, keep]}
        with torch.no_grad():
            torch.testing.assert_close(
                model(**twin).logits[row, -1], model(**alone).logits[0, -1], rtol=1e-4, atol=1e-4
            )
    part = places & (torch.cumsum(places.int(), 1) <= FAMILIES[name].image_tokens)
    with pytest.raises(ValueError, match="image tokens; the model takes pictures whole"):
        without(inputs, part, model=model)


@pytest.mark.parametrize("name", VISUAL)
def test_padding_in_front_moves_positions_and_nothing_else(name):
    model, inputs, _ = two_pictures(name, padded=False)
    found = image_positions(model, inputs)
    moved = dict(inputs)
    for key, value in inputs.items():
        if value.shape[:2] == found.shape:
            moved[key] = torch.nn.functional.pad(value, (3, 0))
    moved["attention_mask"] = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (3, 0))
    shifted = image_positions(model, moved)
    assert torch.equal(shifted[:, 3:], found) and not shifted[:, :3].any()
    with torch.no_grad():
        torch.testing.assert_close(model(**moved).logits[:, -1], model(**inputs).logits[:, -1], rtol=1e-4, atol=1e-4)
