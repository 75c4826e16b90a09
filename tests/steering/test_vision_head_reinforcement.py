"""VHR: its identities, the choice it makes layer by layer, the ways a model may be run under it, what it refuses."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.zoo import FAMILIES, families

from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.edits import ScaleHeads
from headwise.attend.groups import image_tokens, recent, spans
from headwise.attend.saving import load_edits, save_edits
from headwise.errors import UnsupportedModel
from headwise.heads.vision import context_divergence, vision_divergence
from headwise.hf.images import without
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import steer
from headwise.specimens.registry import load_specimen
from headwise.specimens.vision_language import vision_language_inputs
from headwise.steering.vision_head_reinforcement import VisionAwareHeadReinforcement, reinforced_layers
from headwise.tasks.captions import shapes_captions

VISUAL = families(kind="multimodal")
LENGTH = 24


def pair(name, **options):
    model = FAMILIES[name].build()
    return model, FAMILIES[name].inputs(model, length=LENGTH, **options)


@pytest.fixture(scope="module")
def model():
    return load_specimen("vision-language").model


@pytest.fixture(scope="module")
def inputs():
    return vision_language_inputs(shapes_captions(5, counterfactual=True, seed=3))


def logits(model, inputs, *edits):
    with torch.no_grad(), steer(model, *edits):
        return model(**inputs).logits


def picked(edit):
    """`[b l h]` the heads that an edit has chosen, which it has."""
    assert edit.chosen is not None
    return edit.chosen


def naive_choice(model, inputs, layers, alpha):
    """`[b l h]` what is chosen by one pair of separate forwards for every layer, those before it reinforced."""
    count, heads = model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    scale = torch.ones(len(inputs["input_ids"]), count, heads)
    for layer in layers:
        with steer(model, ScaleHeads(scale=scale.clone())):
            chosen = vision_divergence(model, inputs, together=False).chosen()[:, layer]
        scale[:, layer] = torch.where(chosen, alpha, 1.0)
    return scale


# Identities


def test_one_is_the_identity_bit_for_bit(model, inputs):
    assert VisionAwareHeadReinforcement(alpha=1.0).neutral
    assert torch.equal(logits(model, inputs, VisionAwareHeadReinforcement(alpha=1.0)), logits(model, inputs))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_choice_is_made_layer_by_layer_in_one_forward(model, inputs, alpha):
    edit = VisionAwareHeadReinforcement(alpha)
    found = logits(model, inputs, edit)
    scale = naive_choice(model, inputs, (1, 2, 3), alpha)
    assert edit.chosen is not None and torch.equal(picked(edit), scale != 1)
    torch.testing.assert_close(found, logits(model, inputs, ScaleHeads(scale=scale)), atol=1e-5, rtol=1e-4)
    at_once = vision_divergence(model, inputs).chosen()
    assert not torch.equal(picked(edit)[:, 2:], at_once[:, 2:]), "later layers see that earlier ones are reinforced"
    assert len({tuple(row.flatten().tolist()) for row in picked(edit)}) > 1, "every picture has its own heads"


@pytest.mark.parametrize("name", VISUAL)
def test_it_does_so_in_every_family_with_grouped_keys(name):
    model, inputs = pair(name)
    edit = VisionAwareHeadReinforcement(2.0, layers="all")
    found = logits(model, inputs, edit)
    scale = naive_choice(model, inputs, (0, 1), 2.0)
    assert torch.equal(picked(edit), scale > 1)
    torch.testing.assert_close(found, logits(model, inputs, ScaleHeads(scale=scale)), atol=1e-5, rtol=1e-4)


def test_scaling_a_head_is_scaling_its_columns_of_the_projection(model, inputs):
    edit = VisionAwareHeadReinforcement(2.0)
    single = {key: value[:1] for key, value in inputs.items()}
    found = logits(model, single, edit)
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for layer, chosen in enumerate(picked(edit)[0]):
            weight = folded.model.language_model.layers[layer].self_attn.o_proj.weight
            weight.mul_(torch.where(chosen, 2.0, 1.0).repeat_interleave(8))
        torch.testing.assert_close(found, folded(**single).logits, atol=1e-5, rtol=1e-6)


@given(st.integers(0, 300), st.floats(1.01, 10))
def test_proposition_1_the_normed_stream_turns_towards_what_is_reinforced(seed, alpha):
    generator = torch.Generator().manual_seed(seed)
    stream, head = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    before, after = (x / x.square().mean().sqrt() for x in (stream + head, stream + alpha * head))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(after, head, 0) > cosine(before, head, 0) - 1e-12


def test_outliers_may_be_kept(model, inputs):
    kept, dropped = (VisionAwareHeadReinforcement(2.0, "1", drop_outliers=flag) for flag in (False, True))
    for edit in (kept, dropped):
        logits(model, inputs, edit)
    found = vision_divergence(model, inputs)
    for edit, flag in ((kept, False), (dropped, True)):
        assert torch.equal(picked(edit)[:, 1], found.chosen(drop_outliers=flag)[:, 1])


# How it may be run


def test_batches_with_padding_are_their_rows(model):
    scenes = shapes_captions(3, counterfactual=True, seed=9)
    texts = ["describe :", "describe : ring , hook ,", "is there a ring ?"]
    batch, edit = vision_language_inputs(scenes, texts), VisionAwareHeadReinforcement(2.0)
    found = logits(model, batch, edit)
    chosen = picked(edit)
    for row in range(3):
        alone = vision_language_inputs(scenes[row : row + 1], texts[row : row + 1])
        torch.testing.assert_close(found[row, -1], logits(model, alone, edit)[0, -1], atol=1e-5, rtol=1e-4)
        assert torch.equal(picked(edit)[0], chosen[row])
    right = vision_language_inputs(scenes, texts, padding="right")
    outputs = logits(model, right, edit)
    last = right["attention_mask"].sum(1) - 1
    torch.testing.assert_close(outputs[torch.arange(3), last], found[:, -1], atol=1e-5, rtol=1e-4)


def test_writing_with_a_cache_is_writing_without_one(model, inputs):
    edit = VisionAwareHeadReinforcement(2.0)
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad(), steer(model, edit):
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(written, plain)
    scale = torch.where(picked(edit), 2.0, 1.0)
    ids = inputs["input_ids"]
    for _ in range(written.shape[1] - prompt):
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, logits(model, given, ScaleHeads(scale=scale))[:, -1].argmax(-1, keepdim=True)], 1)
    # A sequence that has ended is filled up.
    ended = (written[:, prompt:] == 4).int().cumsum(1).bool().roll(1, 1)
    ended[:, 0] = False
    assert torch.equal(ids[:, prompt:][~ended], written[:, prompt:][~ended])


def test_a_prompt_in_parts_keeps_its_first_choice(model, inputs):
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    more = torch.tensor([[15, 7, 16]]).expand(5, -1)
    edit = VisionAwareHeadReinforcement(2.0)
    with torch.no_grad(), steer(model, edit):
        first = model(input_ids=ids, pixel_values=pixels, use_cache=True)
        chosen = picked(edit)
        parts = model(input_ids=more, **with_cache(model, cache_of(first))).logits
    assert picked(edit) is chosen
    whole = {"input_ids": torch.cat([ids, more], 1), "pixel_values": pixels}
    expected = logits(model, whole, ScaleHeads(scale=torch.where(chosen, 2.0, 1.0)))
    torch.testing.assert_close(parts, expected[:, -3:], atol=1e-5, rtol=1e-4)


def test_text_before_the_picture_in_a_part_of_its_own_waits_for_it(model, inputs):
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    edit = VisionAwareHeadReinforcement(2.0)
    with torch.no_grad(), steer(model, edit):
        first = model(input_ids=ids[:, :1], use_cache=True)
        assert edit.chosen is None
        model(input_ids=ids[:, 1:], pixel_values=pixels, **with_cache(model, cache_of(first)))
    one = VisionAwareHeadReinforcement(2.0)
    logits(model, {"input_ids": ids, "pixel_values": pixels}, one)
    assert torch.equal(picked(edit)[:, 1], picked(one)[:, 1])


def test_beams_share_the_heads_of_their_sequence(model, inputs):
    edit = VisionAwareHeadReinforcement(2.0)
    with torch.no_grad(), steer(model, edit):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        single = picked(edit)
        beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)
        many = picked(edit)
    assert many.shape[0] in (5, 15)
    assert torch.equal(many if len(many) == 5 else many[::3], single)
    with torch.no_grad(), steer(model, ScaleHeads(scale=torch.where(single, 2.0, 1.0).repeat_interleave(3, 0))):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False), beams)


def test_a_prompt_without_a_picture_is_untouched_also_beside_one_with(model, inputs):
    text = vision_language_inputs(None, ["describe : ring ,", "describe :"])
    edit = VisionAwareHeadReinforcement(2.0)
    assert torch.equal(logits(model, text, edit), logits(model, text)) and edit.chosen is None
    scenes = shapes_captions(1, seed=1)
    mixed = vision_language_inputs(scenes, "describe :")
    other = torch.nn.functional.pad(torch.tensor([[0, 5, 6]]), (16, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones(1, 3, dtype=torch.long), (16, 0))
    both = {
        "input_ids": torch.cat([mixed["input_ids"], other]),
        "attention_mask": torch.cat([mixed["attention_mask"], mask]),
        "pixel_values": mixed["pixel_values"],
    }
    found = logits(model, both, edit)
    assert picked(edit)[0].any() and not picked(edit)[1].any()
    torch.testing.assert_close(found[1], logits(model, both)[1])
    torch.testing.assert_close(found[0, -1], logits(model, mixed, edit)[0, -1], atol=1e-5, rtol=1e-4)


def test_several_pictures_go_together():
    model, inputs = pair("llava")
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"].flip(0)], 1)
    both = {"input_ids": ids, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    edit = VisionAwareHeadReinforcement(2.0, "1")
    logits(model, both, edit)
    assert torch.equal(picked(edit), naive_choice(model, both, (1,), 2.0) > 1)


def test_another_part_of_the_prompt_can_be_what_counts():
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    group = torch.zeros_like(ids, dtype=torch.bool)
    group[:, 2:6] = True
    edit = VisionAwareHeadReinforcement(3.0, "0", group=spans([(2, 6)]))
    logits(model, {"input_ids": ids}, edit)
    expected = context_divergence(model, ids, without({"input_ids": ids}, group)).chosen()
    assert torch.equal(picked(edit)[:, 0], expected[:, 0]) and not picked(edit)[:, 1].any()


def test_rows_and_heads_can_be_limited(model, inputs):
    prompt, every = VisionAwareHeadReinforcement(2.0, when="prompt"), VisionAwareHeadReinforcement(2.0)
    with torch.no_grad():
        outputs = {}
        for edit in (prompt, every):
            with steer(model, edit):
                first = model(**inputs, use_cache=True)
                step = model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache_of(first)))
            outputs[edit.when] = (first.logits, step.logits)
    assert torch.equal(outputs["prompt"][0], outputs["all"][0])
    assert not torch.allclose(outputs["prompt"][1], outputs["all"][1], atol=1e-3)
    later = VisionAwareHeadReinforcement(2.0, when="generated")
    assert torch.equal(logits(model, inputs, later), logits(model, inputs)) and picked(later)[:, 1:].any()
    some = VisionAwareHeadReinforcement(2.0, heads=["1.0", "1.1", "1.2", Head(0, 3)])
    logits(model, inputs, some)
    assert picked(some)[:, 1, :3].any() and picked(some).sum() == picked(some)[:, 1, :3].sum()
    assert torch.equal(picked(some)[:, 1, :3], picked(every)[:, 1, :3])


def test_two_models_choose_for_themselves(model, inputs):
    edit, other = VisionAwareHeadReinforcement(2.0), load_specimen("vision-language").model
    with torch.no_grad(), steer(model, edit):
        before = logits(other, inputs)
        model(**inputs)
        assert torch.equal(logits(other, inputs), before)


def test_leaving_restores_also_after_an_exception(model, inputs):
    before = logits(model, inputs)
    implementation = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    ends = {**inputs, "input_ids": inputs["input_ids"][:, :17]}
    with pytest.raises(ValueError, match="ends inside what is taken away"):
        logits(model, ends, VisionAwareHeadReinforcement(2.0))
    assert torch.equal(logits(model, inputs), before)
    assert implementation == (
        model.config.text_config._attn_implementation,
        model.config.vision_config._attn_implementation,
    )


def test_it_is_saved_as_json(tmp_path):
    edit = VisionAwareHeadReinforcement(1.5, (1, slice(-2, None)), False)
    assert edit.layers == "1,-2:"
    save_edits([edit], str(tmp_path / "edit.json"))
    known: dict[str, Callable[..., Edit]] = {"VisionAwareHeadReinforcement": VisionAwareHeadReinforcement}
    assert load_edits(str(tmp_path / "edit.json"), known) == [edit]


# Layers, and what is refused


def test_the_layers_of_the_paper_and_their_share_of_smaller_models():
    assert reinforced_layers(None, 32) == [1, *range(18, 32)]
    assert reinforced_layers(None, 4) == [1, 2, 3] and reinforced_layers(None, 1) == [0]
    assert reinforced_layers((1, slice(-14, None)), 32) == reinforced_layers("1, -14:", 32) == [1, *range(18, 32)]
    assert reinforced_layers("all", 3) == [0, 1, 2] and reinforced_layers(2, 3) == [2]
    with pytest.warns(UserWarning, match="-14: reaches beyond the 4 layers"):
        assert reinforced_layers((1, slice(-14, None)), 4) == [0, 1, 2, 3]
    for layers, message in (
        (4, "4 is out of range; the model has layers 0 to 3"),
        ("two", "'two' cannot be read"),
        ("1:2:3", "cannot be read"),
        ((), "names none"),
        ("3:3", "names none"),
    ):
        with pytest.raises(ValueError, match=message):
            reinforced_layers(layers, 4)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        VisionAwareHeadReinforcement(alpha)


def test_what_it_cannot_do_is_refused_when_it_is_opened(model, inputs):
    llama = FAMILIES["llama"].build()
    with pytest.raises(UnsupportedModel, match="names no image token"), steer(llama, VisionAwareHeadReinforcement()):
        pass
    with pytest.raises(ValueError, match="not in the tower that reads the prompt"):
        logits(model, inputs, VisionAwareHeadReinforcement(heads="vision:0.1"))
    with pytest.raises(ValueError, match="may hold generated tokens"):
        VisionAwareHeadReinforcement(group=recent(2))
    with pytest.raises(ValueError, match="layers: 9 is out of range"):
        logits(model, inputs, VisionAwareHeadReinforcement(layers=9))
    with torch.no_grad(), pytest.raises(ValueError, match="prompt was read before this edit was there"):
        first = model(**inputs, use_cache=True)
        with steer(model, VisionAwareHeadReinforcement()):
            model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache_of(first)))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"no image token, or its ids|came as embeddings") as caught:
        given = {"inputs_embeds": embeds[:, 17:]}
        logits(model, given, VisionAwareHeadReinforcement(group=spans([(0, 1)])))
    assert "input_ids" in str(caught.value)


def test_a_cut_of_layers_warns_once_when_it_is_opened(model, inputs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits(model, inputs, VisionAwareHeadReinforcement(2.0, "1,-14:"))
    assert sum("reaches beyond" in str(one.message) for one in caught) == 1
    assert image_tokens().name == "image"
