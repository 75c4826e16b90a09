"""SAISA's network: text rows alone are the whole rows, image rows do not matter, and a cache changes nothing."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, StaticCache

from headwise.attend.edits import Ablate
from headwise.attend.groups import image_tokens
from headwise.errors import UnsupportedModel
from headwise.heads.masses import group_mass
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.session import steer
from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration, saisa_state

IMAGE, SIZE = 1, 16
BOTH = ("saisa", "naavit")


def network(alignment: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config: Any = SaisaConfig.example(alignment, **{"text_config": text_config(), **changes})  # type: ignore[arg-type]
    model = SaisaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def text_config(**changes: Any) -> dict[str, Any]:
    """Of the small language model, with weights so large that everything that changes shows."""
    example: Any = SaisaConfig.example().text_config
    return {**example.to_dict(), "initializer_range": 0.2, **changes}


def prompt(*pieces: int, seed: int = 0) -> Tensor:
    """Ids of a prompt: a number of words, 0 for an image."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.full((SIZE,), IMAGE) if not n else torch.randint(4, 64, (n,), generator=generator) for n in pieces]
    return torch.cat(parts)


def batch(*rows: Tensor, side: str = "left") -> dict[str, Tensor]:
    """Prompts of different lengths as one batch, with positions as generate makes them and a picture for each image."""
    width = max(len(row) for row in rows)
    pads = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    mask = (ids != 0).long()
    count = int((ids == IMAGE).sum()) // SIZE
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}


ARRANGED = {
    "one image in the middle": batch(prompt(3, 0, 5)),
    "image first": batch(prompt(0, 4)),
    "other starts": batch(prompt(2, 0, 6), prompt(6, 0, 2, seed=1)),
    "left padding": batch(prompt(3, 0, 5), prompt(1, 0, 2, seed=1)),
    "right padding": batch(prompt(3, 0, 5), prompt(1, 0, 2, seed=1), side="right"),
    "two images, one, none": batch(prompt(2, 0, 3, 0, 2), prompt(4, 0, 3, seed=1), prompt(9, seed=2)),
    "images side by side": batch(prompt(1, 0, 0, 4), prompt(2, 0, 8, seed=1)),
}


def run(model: Any, inputs: dict[str, Tensor], implementation: str = "auto", **more: Any) -> Tensor:
    model.config.implementation = implementation
    with torch.no_grad():
        logits = model(**inputs, **more).logits
    model.config.implementation = "auto"
    return logits


def words(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["input_ids"] != IMAGE) & (inputs["input_ids"] != 0)


@pytest.mark.parametrize("alignment", BOTH)
@pytest.mark.parametrize("name", ARRANGED)
def test_text_rows_alone_are_the_whole_rows(alignment: str, name: str):
    model, inputs = network(alignment), ARRANGED[name]
    text = words(inputs)
    rows = []
    layer = model.model.language_model.layers[0]
    hook = layer.mlp.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    compressed, whole = (run(model, inputs, name) for name in ("compressed", "reference"))
    hook.remove()
    if alignment == "saisa":
        assert rows == [int(text.sum(1).max()), inputs["input_ids"].shape[1]]
    torch.testing.assert_close(compressed[text], whole[text], atol=1e-5, rtol=1e-4)
    assert not compressed[inputs["input_ids"] == IMAGE].any(), "image tokens predict nothing"


@pytest.mark.parametrize("alignment", BOTH)
def test_a_padded_batch_is_its_rows(alignment: str):
    model, inputs = network(alignment), ARRANGED["left padding"]
    together = run(model, inputs)
    for row, alone in enumerate((prompt(3, 0, 5), prompt(1, 0, 2, seed=1))):
        single = {"input_ids": alone[None], "pixel_values": inputs["pixel_values"][row : row + 1]}
        torch.testing.assert_close(together[row, -len(alone) :], run(model, single)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["saisa", "naavit", "embedding"])
def test_eager_is_fused(kind: str):
    inputs = ARRANGED["two images, one, none"]
    model = network(kind)
    fused = run(model, inputs)
    for implementation in ("compressed", "reference"):
        model.set_attn_implementation("eager")
        text = words(inputs)
        torch.testing.assert_close(run(model, inputs, implementation)[text], fused[text], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["compressed", "reference"])
def test_nans_in_image_rows_reach_no_text(implementation: str):
    """Planted in the embedding of the image token, and in image rows between all layers of SAISA."""
    model, inputs = network("saisa"), ARRANGED["two images, one, none"]
    clean = run(model, inputs, implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight[IMAGE] = torch.nan
    images = inputs["input_ids"] == IMAGE
    planted = []

    def plant(_: Any, args: tuple, out: Tensor) -> Tensor:
        if out.shape[:2] != images.shape:
            return out
        planted.append(True)
        return out.masked_fill(images[..., None], torch.nan)

    hooks = [layer.register_forward_hook(plant) for layer in model.model.language_model.layers]
    text = words(inputs)
    assert torch.equal(run(model, inputs, implementation)[text], clean[text])
    assert len(planted) == (3 if implementation == "reference" else 0)
    for hook in hooks:
        hook.remove()
    model.train()
    model.config.implementation = implementation
    labels = inputs["input_ids"].masked_fill(~text, -100)
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "embed_tokens" not in name:
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("alignment", "same"), [("saisa", True), ("naavit", True), ("embedding", False)])
def test_the_order_of_image_tokens(alignment: str, same: bool):
    """Image tokens moved together with their positions: no matter unless they attend to each other."""
    model, ids = network(alignment), prompt(3, 0, 5)[None]
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        images = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    positions = torch.arange(ids.shape[1])[None]
    order = torch.randperm(SIZE)
    moved = copy.copy(images)
    moved.pooler_output = [images.pooler_output[0][order]]
    shifted = positions.clone()
    shifted[:, 3 : 3 + SIZE] = positions[:, 3 : 3 + SIZE][:, order]
    before = run(model, {"input_ids": ids, "position_ids": positions}, mm_encoder_outputs={"image": images})
    after = run(model, {"input_ids": ids, "position_ids": shifted}, mm_encoder_outputs={"image": moved})
    kept = run(model, {"input_ids": ids, "position_ids": positions}, mm_encoder_outputs={"image": moved})
    text = (ids != IMAGE)[0]
    assert torch.allclose(before[0, text], after[0, text], atol=1e-5) == same
    assert not torch.allclose(before[0, text], kept[0, text], atol=1e-4), "without their positions it does matter"


@pytest.mark.parametrize("alignment", BOTH)
def test_without_an_image_it_is_the_language_model(alignment: str):
    model, ids = network(alignment), torch.stack([prompt(9), prompt(9, seed=1)])
    plain = LlamaForCausalLM(model.config.text_config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("alignment", BOTH)
@pytest.mark.parametrize("name", ["left padding", "two images, one, none"])
def test_decoding_with_a_cache_is_recomputation(alignment: str, name: str):
    model, inputs = network(alignment), ARRANGED[name]
    options = {"max_new_tokens": 6, "do_sample": False}
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    cached = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    again = model.generate(**given, **options, use_cache=False)
    assert torch.equal(cached.sequences, again)
    steps = torch.stack(cached.logits, 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    whole = {"input_ids": cached.sequences, "attention_mask": mask, "pixel_values": inputs["pixel_values"],
             "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}  # fmt: skip
    logits = run(model, whole)[:, -7:-1]
    torch.testing.assert_close(steps, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alignment", BOTH)
def test_a_static_cache_and_beams(alignment: str):
    model, inputs = network(alignment), ARRANGED["left padding"]
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**given, **options)
    static = model.generate(**given, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(plain, static)
    beams = model.generate(**given, **options, num_beams=3)
    whole = model.generate(**given, **options, num_beams=3, use_cache=False)
    assert torch.equal(beams, whole)


def test_a_static_cache_by_hand():
    model, inputs = network("saisa"), ARRANGED["one image in the middle"]
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    static = run(model, inputs, **with_cache(model, cache))
    torch.testing.assert_close(static, run(model, inputs))
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("alignment", BOTH)
def test_a_second_image_in_a_later_turn(alignment: str):
    """A turn on a filled cache, with an image of its own, is the end of one long prompt."""
    model = network(alignment)
    first, second = batch(prompt(3, 0, 4), prompt(2, 0, 1, seed=1)), prompt(2, 0, 3, seed=3)
    turns = torch.cat([first["input_ids"], second.expand(2, -1)], 1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, len(second), dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    pixels = torch.randn(4, 3, 32, 32)
    pixels[:2], order = first["pixel_values"], [0, 2, 1, 3]  # row by row: its first image, then its second
    given = {"input_ids": turns, "attention_mask": mask, "position_ids": positions}
    whole = run(model, {**given, "pixel_values": pixels[order]})
    width = first["input_ids"].shape[1]
    for implementation in ("compressed", "reference"):
        model.config.implementation = implementation
        with torch.no_grad():
            cache = cache_of(model(**first, use_cache=True))
            later = model(input_ids=turns[:, width:], attention_mask=mask, position_ids=positions[:, width:],
                          pixel_values=pixels[2:], **with_cache(model, cache)).logits  # fmt: skip
        text = turns[:, width:] != IMAGE
        torch.testing.assert_close(later[text], whole[:, width:][text], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alignment", BOTH)
def test_images_are_encoded_once_for_all_turns(alignment: str):
    model, inputs = network(alignment), ARRANGED["other starts"]
    images = model.encode_images(inputs["pixel_values"])
    assert [tuple(one.shape) for one in images.pooler_output] == [(SIZE, 3, 2 * 2 * 12)] * 2
    counts = []
    keys = model.model.language_model.layers[1].self_attn.k_proj
    hook = keys.register_forward_hook(lambda _, args, out: counts.append(args[0].shape[-2]))
    given = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": images}}
    text = words(inputs)
    for _ in range(2):
        torch.testing.assert_close(run(model, given)[text], run(model, inputs)[text], atol=1e-5, rtol=1e-4)
    hook.remove()
    assert counts.count(8) == 4 and counts.count(2 * SIZE) == 2, "the image's keys are made for pixels only"
    options = {"max_new_tokens": 4, "do_sample": False}
    pixels = model.generate(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], **options)
    assert torch.equal(model.generate(**given, **options), pixels)
    with pytest.raises(ValueError, match="encode_images gave keys and values, but whole rows are asked for"):
        run(model, given, "reference")
    with pytest.raises(ValueError, match="the keys of an image depend on the text before"):
        network("embedding").encode_images(inputs["pixel_values"])


@pytest.mark.parametrize("alignment", BOTH)
def test_probes_and_edits_see_whole_rows(alignment: str):
    """Masses on the image are those of the weights, and an edit acts; leaving restores bit for bit."""
    model, inputs = network(alignment), ARRANGED["other starts"]
    before = run(model, inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    images, text = inputs["input_ids"] == IMAGE, words(inputs)
    found = group_mass(model, inputs, {"image": image_tokens()}, rows=-1)
    wanted = torch.stack([(w * images[:, None, None]).sum(-1)[:, :, -1] for w in weights], 1)
    torch.testing.assert_close(found["image"], wanted, atol=1e-5, rtol=1e-4)
    with steer(model, Ablate(["1.2"])):
        assert not torch.allclose(run(model, inputs)[text], before[text], atol=1e-4)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("alignment", BOTH)
def test_gradients_of_every_path(alignment: str):
    """Compressed rows, whole rows and checkpointed whole rows have one gradient; also that of the projectors."""
    inputs = ARRANGED["two images, one, none"]
    labels = inputs["input_ids"].masked_fill(~words(inputs), -100)
    found = {}
    for name in ("compressed", "reference", "checkpointed"):
        model = network(alignment)
        model.train()
        if name == "checkpointed":
            for layer in model.model.language_model.layers:  # as the Trainer's gradient_checkpointing=True does
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        else:
            model.config.implementation = name
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        found[name] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("multi_modal_projector" in name for name in found["compressed"])
    for name in ("reference", "checkpointed"):
        assert found[name].keys() == found["compressed"].keys()
        for key, value in found["compressed"].items():
            torch.testing.assert_close(found[name][key], value, atol=2e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def test_the_loss_is_that_of_text_which_text_predicts():
    model, inputs = network("saisa"), ARRANGED["other starts"]
    ids, text = inputs["input_ids"], words(inputs)
    with torch.no_grad():
        out = model(**inputs, labels=ids)
    logits = out.logits
    asked = [(row, i) for row in range(2) for i in range(ids.shape[1] - 1) if text[row, i]]
    wanted = [-logits[row, i].log_softmax(-1)[ids[row, i + 1]] for row, i in asked]
    torch.testing.assert_close(out.loss, torch.stack(wanted).mean())


def test_a_few_steps_learn_the_picture():
    """The answer is which of two pictures it is; text alone cannot know it."""
    model = network("saisa").train()
    ids = prompt(2, 0, 3)[None].repeat(2, 1)
    ids[:, -1] = torch.tensor([10, 11])
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    pixels = torch.randn(2, 3, 32, 32)
    optimiser = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "embedding"])
def test_it_survives_the_disk(alignment: str, tmp_path: Path):
    model, inputs = network(alignment), ARRANGED["left padding"]
    model.save_pretrained(tmp_path)
    again: Any = SaisaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.alignment == alignment
    assert torch.equal(run(again, inputs), run(model, inputs))
    low = copy.deepcopy(model).bfloat16()
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    text = words(inputs)
    full = run(again, ARRANGED["left padding"])[text]
    assert (run(low, inputs)[text].float() - full).norm() < 0.05 * full.norm()


OTHERS = {
    "mistral": {"text_config": text_config(model_type="mistral", sliding_window=None)},
    "qwen2": {"text_config": text_config(model_type="qwen2", layer_types=None)},
    "qwen3": {"text_config": text_config(model_type="qwen3", head_dim=16, layer_types=None)},
    "siglip": {
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        "vision_feature_select_strategy": "full",
    },
    "two feature layers": {"vision_feature_layer": [-2, -1]},
}  # fmt: skip


@pytest.mark.parametrize("alignment", BOTH)
@pytest.mark.parametrize("name", OTHERS)
def test_other_language_models_and_encoders(alignment: str, name: str):
    model, inputs = network(alignment, **OTHERS[name]), ARRANGED["other starts"]
    text = words(inputs)
    compressed, whole = (run(model, inputs, name) for name in ("compressed", "reference"))
    torch.testing.assert_close(compressed[text], whole[text], atol=2e-5, rtol=1e-3)
    other = run(model, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    assert not torch.allclose(other[text], compressed[text], atol=1e-3)


def test_an_official_state_dict_loads():
    model = network("saisa")
    official = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if "multi_modal_projector" in name:
            place = {"linear_1": 0, "linear_2": 2}[parts[3]]
            official[f"model.layers.{parts[2]}.mm_projector.{place}.{parts[4]}"] = value
        elif "vision_tower" in name:
            official[name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")] = value
        else:
            official[name.replace("language_model.", "")] = value
    official["model.mm_projector.0.weight"] = torch.zeros(2, 2)
    other = network("saisa", seed=1)
    other.load_state_dict(saisa_state(official, other.config))
    inputs = ARRANGED["left padding"]
    assert torch.equal(run(other, inputs), run(model, inputs))
    del official["model.layers.1.mm_projector.0.weight"], official["model.layers.1.mm_projector.2.weight"]
    del official["model.layers.1.mm_projector.0.bias"], official["model.layers.1.mm_projector.2.bias"]
    with pytest.raises(ValueError, match="layer 1 of 3 has no mm_projector"):
        saisa_state(official, other.config)


def test_refusals():
    model, inputs = network("saisa"), ARRANGED["one image in the middle"]
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with pytest.raises(ValueError, match="16 image tokens in the prompt but 32 image features"):
        model(input_ids=ids, pixel_values=pixels.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="16 image tokens in the prompt but 0 image features"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="0 image tokens in the prompt but 16 image features"):
        model(input_ids=ids[:, :3], pixel_values=pixels)
    with pytest.raises(ValueError, match="a sequence ends with an image"):
        model(input_ids=ids[:, :-5], pixel_values=pixels)
    with pytest.raises(ValueError, match="a sequence ends with an image"):
        model(input_ids=ids[:, 3:-5], pixel_values=pixels)
    with pytest.raises(ValueError, match="give pixel_values, or mm_encoder_outputs with an image, not both"):
        model(input_ids=ids, pixel_values=pixels, mm_encoder_outputs={"image": model.encode_images(pixels)})
    with pytest.raises(ValueError, match="attention_mask covers 3 tokens, 0 cached ones and 24 new ones are there"):
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="alignment is 'cross'; choose saisa, naavit, embedding"):
        SaisaConfig("cross")
    with pytest.raises(ValueError, match="implementation is 'fast'; choose auto, compressed, reference"):
        SaisaConfig(implementation="fast")
    with pytest.raises(UnsupportedModel, match="attends in windows of 8 tokens"):
        network("saisa", text_config=text_config(model_type="mistral", sliding_window=8))
    with pytest.raises(UnsupportedModel, match="is no layer of a norm and attention"):
        network("saisa", text_config=text_config(model_type="gemma2", head_dim=12, layer_types=None))
    del model.model.multi_modal_projector[-1]
    with pytest.raises(ValueError, match="2 projectors for 3 layers"):
        model(input_ids=ids, pixel_values=pixels)


def test_embeddings_instead_of_ids():
    model, inputs = network("saisa"), ARRANGED["other starts"]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {key: value for key, value in inputs.items() if key != "input_ids"}
    text = words(inputs)
    torch.testing.assert_close(run(model, {**given, "inputs_embeds": embeds})[text], run(model, inputs)[text])
