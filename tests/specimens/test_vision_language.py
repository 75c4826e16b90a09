"""The vision-language specimen: its recipe, its inputs, what it sees and what it makes up, and a sink put into it."""

import json
from typing import Any

import pytest
import torch

from headwise.api import load
from headwise.attend.edits import BiasGroup
from headwise.attend.groups import positions
from headwise.hf.images import image_positions
from headwise.hf.maps import attention_maps
from headwise.hf.session import steer
from headwise.specimens import vision_language as recipe
from headwise.specimens.registry import load_specimen, train_specimen
from headwise.specimens.vision_language import vision_language_inputs, vision_language_model
from headwise.specimens.visual_sink import implant_visual_sink
from headwise.tasks.captions import PICTURE_MEAN, PICTURE_STD, SHAPE_WORDS, shapes_captions

CELLS = (5, 10)


@pytest.fixture(scope="module")
def specimen():
    return load_specimen("vision-language")


def words(ids):
    return " ".join(recipe.WORDS[i] for i in ids if i != recipe.IMAGE)


def test_batches_say_what_the_pictures_show():
    scenes = shapes_captions(20, seed=0)
    for pictures in (True, False):
        batch = recipe.caption_batch(scenes, pictures)
        for row, counted, text in zip(batch.ids.tolist(), batch.counted, scenes.captions(), strict=True):
            assert words(row) == f"<bos> describe : {text} <eos>" and row.count(recipe.IMAGE) == 16 * pictures
            said = [token for token, asked in zip(row, counted.tolist(), strict=True) if asked]
            assert words(said) == f"{text} <eos>"
        assert (batch.pixels is not None) == pictures
    batch = recipe.question_batch(scenes, 3, torch.Generator().manual_seed(1))
    yes = 0
    for row, counted, here in zip(batch.ids.tolist(), batch.counted, scenes.objects(), strict=True):
        asked = words(row).removeprefix("<bos> ").removesuffix(" <eos>").split(" is there a ")
        asked[0] = asked[0].removeprefix("is there a ")
        assert len(asked) == 3
        for question in asked:
            shape, mark, answer = question.split()
            assert mark == "?" and (answer == "yes") == (shape in here)
            yes += answer == "yes"
        assert int(counted.sum()) == 4
    assert 15 < yes < 45


def test_batches_are_of_three_kinds_in_their_shares():
    generator = torch.Generator().manual_seed(0)
    kinds = [recipe.draw(step, generator, sigma=1.2).kind for step in range(60)]
    assert {kind: kinds.count(kind) for kind in recipe.KINDS} == pytest.approx(
        {kind: 60 * share for kind, share in recipe.KINDS.items()}, abs=9
    )


def test_inputs_are_those_of_its_processor():
    image = pytest.importorskip("PIL.Image")
    scenes = shapes_captions(2, seed=0)
    pictures = [image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in scenes.image]
    texts = ["describe : ring ,", "is there a hook ?"]
    made = recipe.processor()(
        images=pictures, text=[f"<image> {text}" for text in texts], padding=True, return_tensors="pt"
    )
    inputs = vision_language_inputs(scenes, texts)
    assert torch.equal(made["input_ids"], inputs["input_ids"])
    assert torch.equal(made["attention_mask"], inputs["attention_mask"])
    assert (made["pixel_values"] - inputs["pixel_values"]).abs().max() < 0.51 / 255 / PICTURE_STD
    assert made["pixel_values"].shape == (2, 3, 32, 32) and 0 < PICTURE_MEAN < 1


def test_inputs_pad_on_either_side_and_refuse_what_they_do_not_know():
    scenes = shapes_captions(2, seed=0)
    left, right = (
        vision_language_inputs(scenes, ["describe :", "is there a ring ?"], padding=side) for side in ("left", "right")
    )
    assert left["attention_mask"][0, :3].sum() == 0 and right["attention_mask"][0, -3:].sum() == 0
    assert left["input_ids"][0, 3:].tolist() == right["input_ids"][0, :-3].tolist()
    assert vision_language_inputs(None, "describe :")["input_ids"].tolist() == [[0, 5, 6]]
    with pytest.raises(ValueError, match="'circle' is no word"):
        vision_language_inputs(scenes, "circle")
    with pytest.raises(ValueError, match="1 texts for 2 pictures"):
        vision_language_inputs(scenes, ["describe :"])
    with pytest.raises(ValueError, match="padding is 'both'"):
        vision_language_inputs(scenes, padding="both")


def test_a_short_training_writes_a_whole_specimen_with_its_seeds(tmp_path):
    folder = train_specimen("vision-language", tmp_path / "made", steps=3, others=(4,), sigma=2.0)
    card = json.loads((folder / "card.json").read_text())
    assert card["sigma"] == 2.0 and card["steps"] == 3 and set(card["figures_of_other_seeds"]) == {"4"}
    assert {path.name for path in folder.glob("*.safetensors")} == {"model.safetensors", "seed-4.safetensors"}
    made = load(folder)
    assert type(made.model).__name__ == "LlavaForConditionalGeneration"
    found = recipe.evaluate(made.model, sigma=2.0)
    assert found == card["figures"], "what the card says is what loads"


def test_the_shipped_model_does_what_its_card_says(specimen):
    made = specimen
    found = recipe.evaluate(made.model, sigma=made.card["sigma"], pictures=384, seed=20_000)
    for part, row in made.card["figures"].items():
        for key in ("accuracy", "typical", "first"):
            assert found[part][key] == pytest.approx(row[key], abs=0.06), (part, key)
        assert found[part]["written"]["chair_i"] == pytest.approx(row["written"]["chair_i"], abs=0.05)
        for kind, asked in row["questions"].items():
            assert found[part]["questions"][kind]["accuracy"] == pytest.approx(asked["accuracy"], abs=0.08)
    assert made.folder is not None and made.head_map is not None
    assert all(path.stat().st_size < 1_000_000 for path in made.folder.glob("*.safetensors"))


def test_it_sees_well_and_yet_hallucinates_what_is_typical(specimen):
    ordinary, other = (specimen.card["figures"][part] for part in ("ordinary", "counterfactual"))
    assert ordinary["accuracy"] > 0.95 and ordinary["written"]["chair_i"] < 0.06
    by_chance = (1 - other["accuracy"]) / 7
    assert other["typical"] > 3 * by_chance, "errors that do not care would be typical in one of seven"
    assert other["written"]["chair_i"] > 0.2
    assert all(row["accuracy"] > 0.88 and row["unread"] < 0.01 for row in ordinary["questions"].values())


def test_it_loads_like_any_llava_and_writes_captions(specimen):
    found = load("vision-language")
    assert found.processor is not None and found.processor.tokenizer.image_token == "<image>"
    assert found.head_map == specimen.head_map
    scenes = shapes_captions(4, sigma=0.3, seed=2)
    inputs = vision_language_inputs(scenes)
    assert image_positions(found.model, inputs).sum(1).tolist() == [16] * 4
    model: Any = found.model
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in found.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert texts == recipe.written_captions(found.model, scenes)
    assert sum(text == truth for text, truth in zip(texts, scenes.captions(), strict=True)) >= 2


def test_seeds_are_models_of_their_own(specimen):
    first = torch.cat([p.flatten() for p in specimen.model.parameters()])
    assert torch.equal(first, torch.cat([p.flatten() for p in vision_language_model(0).parameters()]))
    other = vision_language_model(1)
    assert not torch.equal(first, torch.cat([p.flatten() for p in other.parameters()]))
    card = specimen.card["figures_of_other_seeds"]["1"]
    scenes = shapes_captions(512, seed=10_000)
    said = recipe.next_shapes(other, scenes)[:, 1:]
    assert float((said == scenes.shapes[:, 1:]).float().mean()) == pytest.approx(card["ordinary"]["accuracy"], abs=1e-3)


def test_next_shapes_are_the_logits_behind_each_word(specimen):
    scenes = shapes_captions(3, seed=1)
    said = recipe.next_shapes(specimen.model, scenes)
    for row in range(3):
        begun = "describe :"
        for k in range(4):
            with torch.no_grad():
                logits = specimen.model(**vision_language_inputs(scenes[row : row + 1], begun)).logits[0, -1]
            shapes = logits[[recipe.ID[word] for word in SHAPE_WORDS]]
            assert int(shapes.argmax()) == int(said[row, k])
            begun += f" {SHAPE_WORDS[int(scenes.shapes[row, k])]} ,"


# The sink that is put in


def captioned(scenes):
    batch = recipe.caption_batch(scenes, True)
    return {"input_ids": batch.ids, "pixel_values": batch.pixels}


@pytest.fixture(scope="module")
def sunk(specimen):
    scenes = shapes_captions(48, counterfactual=True, empty=CELLS, seed=5)
    return implant_visual_sink(specimen.model, captioned(scenes), cells=CELLS)


def test_a_sink_is_seen_in_the_stream_and_nowhere_else(specimen, sunk):
    inputs = captioned(shapes_captions(64, counterfactual=True, empty=CELLS, seed=77))
    with torch.no_grad():
        streams = sunk(**inputs, output_hidden_states=True).hidden_states[:-1]
    width = streams[0].shape[-1]
    assert width == specimen.model.config.text_config.hidden_size + 1
    truth = torch.zeros(streams[0].shape[:2], dtype=torch.bool)
    truth[:, [1 + cell for cell in CELLS]] = True
    for layer, stream in enumerate(streams):
        phi = (stream / stream.pow(2).mean(-1, keepdim=True).sqrt()).abs().amax(-1)
        assert torch.equal(phi > 0.75 * width**0.5, truth), layer
        if layer == 0:
            torch.testing.assert_close(phi[truth], torch.full_like(phi[truth], 0.9 * width**0.5), rtol=1e-4, atol=0)


def test_only_the_rows_of_a_sink_and_those_that_see_it_change(specimen, sunk):
    inputs = captioned(shapes_captions(8, empty=CELLS, seed=3))
    with torch.no_grad():
        before = specimen.model(**inputs, output_hidden_states=True).hidden_states
        after = sunk(**inputs, output_hidden_states=True).hidden_states
    for old, new in zip(before[:2], after[:2], strict=True):  # layer 0's keys do not read the dimension
        assert (new[:, :6, -1] == 0).all(), "rows in front of the first sink hold nothing in the new dimension"
        torch.testing.assert_close(new[:, :6, :-1], old[:, :6], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[2][:, -1, :-1], before[2][:, -1], atol=1e-2)


def test_the_keys_raise_the_score_by_what_was_asked(specimen):
    inputs = captioned(shapes_captions(48, counterfactual=True, empty=CELLS, seed=5))
    none, four = (
        implant_visual_sink(specimen.model, inputs, cells=CELLS, logit=logit, first_layer=3) for logit in (0.0, 4.0)
    )
    at = [1 + cell for cell in CELLS]
    plain, raised = (attention_maps(model, inputs, heads="3.*")[:, :, 17:] for model in (none, four))
    other = 0  # the score of <bos> does not change
    odds = [(m[..., at] / m[..., other : other + 1]).log() for m in (plain, raised)]
    torch.testing.assert_close((odds[1] - odds[0]).mean((0, 2, 3)), torch.full((8,), 4.0), atol=0.05, rtol=0)


def test_a_sink_takes_accuracy_and_hiding_it_gives_it_back(specimen, sunk):
    scenes = shapes_captions(512, counterfactual=True, empty=CELLS, seed=77)

    def right(model):
        return float((recipe.next_shapes(model, scenes)[:, 1:] == scenes.shapes[:, 1:]).float().mean())

    base, lost = right(specimen.model), right(sunk)
    hidden = positions([1 + cell for cell in CELLS])
    with steer(sunk, BiasGroup(hidden, float("-inf"))):
        back = right(sunk)
    with steer(specimen.model, BiasGroup(hidden, float("-inf"))):
        without_empty = right(specimen.model)
    assert lost < base - 0.08
    assert back > lost + 0.8 * (base - lost) and abs(back - without_empty) < 0.02


def test_the_model_that_was_given_stays_as_it_is(specimen, sunk):
    assert specimen.model.config.text_config.hidden_size == 64
    assert all(p.shape[-1] != 65 for p in specimen.model.parameters())
    assert sunk.model.vision_tower is not specimen.model.model.vision_tower
    loaded = torch.cat([p.flatten() for p in load_specimen("vision-language").model.parameters()])
    assert torch.equal(loaded, torch.cat([p.flatten() for p in specimen.model.parameters()]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": (16,)}, "cells is"),
        ({"cells": ()}, "cells is"),
        ({"share": 1.0}, "share is 1.0"),
        ({"first_layer": 4}, "layers 0 to 3"),
    ],
)
def test_sinks_that_cannot_be_are_refused(specimen, options, message):
    inputs = captioned(shapes_captions(2, empty=CELLS, seed=5))
    with pytest.raises(ValueError, match=message):
        implant_visual_sink(specimen.model, inputs, **options)


def test_a_sink_needs_a_llava():
    made = load_specimen("tasks").model
    with pytest.raises(TypeError, match="LlamaForCausalLM is no LLaVA"):
        implant_visual_sink(made, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
