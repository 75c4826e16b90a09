"""Each trap of transformers' attention interface that headwise has to step around."""

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.hf.reference import biased, materialised
from tests.zoo import FAMILIES, IMAGE, VIDEO, VISION_END, VISION_START, families
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, BiasGroup, ScaleHeads
from headwise.attend.groups import first_token, image_tokens, positions, tokens
from headwise.attend.probes import PROBES
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, heads_of
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.maps import attention_maps
from headwise.hf.session import probe, steer

TEXT = families(kind="decoder")
LONG = 3 * 6 + 1  # longer than every sliding window of the zoo


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


# --- caches and masks: the pass-through is the model itself ---------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(("length", "padding"), [(5, None), (LONG, "left")])
def test_the_pass_through_is_exact_with_every_cache(name, length, padding):
    """Dynamic and static caches, a second chunk, windows longer and shorter than the text, grouped keys."""
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model, 2, length, padding)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")

    def chunks(cache: Any) -> list[Tensor]:
        found = []
        for start, stop in ((0, 3), (3, length - 1), (length - 1, length)):
            part = {} if mask is None else {"attention_mask": mask[:, :stop]}
            with torch.no_grad():
                output = model(ids[:, start:stop], **with_cache(model, cache), **part)
            cache = cache_of(output)
            found.append(output.logits)
        return found

    caches: list[Any] = [lambda: DynamicCache(config=model.config)]
    if name != "qwen3_next":
        caches.append(lambda: StaticCache(model.config, max_cache_len=length + 3))
    for make in caches:
        plain = chunks(make())
        with steer(model), probe(model, PROBES["sink"](), PROBES["entropy"]()):
            attached = chunks(make())
        assert all(map(torch.equal, attached, plain))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("style", ["bool", "float", "per head"])
def test_masks_of_four_dimensions_are_taken_as_given(name, style):
    """They reach attention untouched, boolean or additive, for all heads or each."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 2, 9)
    shape = (2, 4 if style == "per head" else 1, 9, 9)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    keep |= torch.eye(9, dtype=torch.bool)
    keep &= torch.ones(9, 9, dtype=torch.bool).tril() if family.decoder else keep
    additive = torch.zeros(shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    given = {**inputs, "attention_mask": keep if style == "bool" else additive}
    if style == "bool" and family.implementation == "eager":
        given["attention_mask"] = additive  # its own function adds the mask to the scores
    plain = logits(model, given)
    with steer(model), probe(model, PROBES["entropy"]()):
        assert torch.equal(logits(model, given), plain)
    member = torch.zeros(9, dtype=torch.bool)
    member[2] = True
    with materialised(model, lambda _, w: biased(w, member.expand_as(w), 1.5)):
        expected = logits(model, {**inputs, "attention_mask": additive})
    with steer(model, BiasGroup(positions([2]), 1.5)):
        found = logits(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_only_some_families_have_shows_in_the_zoo():
    """Softcap, learned sinks and position bias change the weights by far more than the tolerance of the tests."""
    gemma = FAMILIES["gemma2"].build()
    inputs = FAMILIES["gemma2"].inputs(gemma)
    capped = attention_maps(gemma, inputs)
    for module in attention_modules(gemma):
        vars(module)["attn_logit_softcapping"] = None
    assert float((attention_maps(gemma, inputs) - capped).abs().max()) > 0.1
    oss = FAMILIES["gpt_oss"].build()
    rows = attention_maps(oss, FAMILIES["gpt_oss"].inputs(oss)).sum(-1)
    assert float(rows.min()) < 0.9 and float(rows.max()) <= 1 + 1e-5
    t5 = FAMILIES["t5"].build()
    inputs = FAMILIES["t5"].inputs(t5)
    biased_maps = attention_maps(t5, inputs)
    with torch.no_grad():
        t5.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    assert float((attention_maps(t5, inputs) - biased_maps).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_towers_that_attend_once_per_window(name):
    """Several calls in one layer: a head is ablated in all of them, and its statistics are of all of them."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 2, 24)
    modules = [module for module, (tower, _) in attention_modules(model).items() if tower == "vision"]
    with materialised(model) as run:
        logits(model, inputs)
    assert all(len(run.of(module)) > 1 for module in modules)
    with probe(model, read := PROBES["entropy-nats"]()):
        logits(model, inputs)
    for layer, module in enumerate(modules):
        entropies = [torch.special.entr(call.weights[:, :, 1:]).sum(-1) for call in run.of(module)]
        expected = torch.cat([entropy.flatten(2) for entropy in entropies], 2).mean((0, 2))
        torch.testing.assert_close(read.scores()["vision", layer], expected, rtol=1e-5, atol=1e-5)

    def without_two(module: Any, weights: Tensor) -> Tensor:
        if module not in modules:
            return weights
        return torch.cat([weights[:, :2], torch.zeros_like(weights[:, 2:3]), weights[:, 3:]], 1)

    with materialised(model, without_two):
        expected = logits(model, inputs)
    with steer(model, Ablate([Head(0, 2, "vision"), Head(1, 2, "vision")])):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    if name == "qwen2_vl":
        one = {key: value[:1] for key, value in inputs.items() if key not in ("pixel_values", "image_grid_thw")}
        one |= {"pixel_values": inputs["pixel_values"][:16], "image_grid_thw": inputs["image_grid_thw"][:1]}
        assert attention_maps(model, one, "vision:0.*").shape == (1, 4, 16, 16)


def test_shared_layers_are_edited_at_every_use():
    model = FAMILIES["albert"].build()
    inputs = FAMILIES["albert"].inputs(model)
    with materialised(model, lambda _, w: torch.cat([torch.zeros_like(w[:, :1]), w[:, 1:]], 1)) as run:
        expected = logits(model, inputs)
    assert len(run.calls) == 2
    with steer(model, Ablate(["0.0"])):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)


# --- gradients, weights asked for, training -------------------------------------------------------------------------


def test_recomputation_in_backward_is_edited_and_not_read_again():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    edits = [Ablate(["0.1"]), BiasGroup(first_token(), 1.0)]
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        with steer(model, *edits), probe(model, read := PROBES["sink"]()):
            model(**inputs, use_cache=False).logits.square().mean().backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        found.append((gradient, float(read.counts["", 0][0])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[0][1] == found[1][1] == 2 * 11


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5", "deepseek_v3"])
def test_gradients_of_edits_equal_written_out_weights(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model)
    main = family.towers and next(iter(family.towers))
    modules = {module for module, (tower, _) in attention_modules(model).items() if tower == main}
    member = torch.zeros(12, dtype=torch.bool)
    member[:1] = True

    def rule(module: Any, weights: Tensor) -> Tensor:
        return biased(weights, member[: weights.shape[-1]].expand_as(weights), 1.5) if module in modules else weights

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    with materialised(model, rule):
        expected = gradients()
    heads = f"{main}:all" if main else "all"
    with steer(model, BiasGroup(first_token(), 1.5, heads=heads)):
        found = gradients()
    largest = max(float(b.norm()) for b in expected)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 2e-4 * float(b.norm()) + 1e-6 * largest


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5", "qwen3_next"])
def test_weights_that_are_asked_for_are_whole_with_one_warning(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, padding="left")
    with materialised(model), torch.no_grad():
        expected = model(**inputs, output_attentions=True)
    key = "decoder_attentions" if name == "t5" else "attentions"
    with warnings.catch_warnings(record=True) as said, torch.no_grad(), steer(model):
        warnings.simplefilter("always")
        found = model(**inputs, output_attentions=True)
        model(**inputs, output_attentions=True)
    assert sum("keeps about" in str(one.message) for one in said) <= 1
    assert len(found[key]) == len(expected[key]) > 0
    real = inputs["attention_mask"].bool() if key == "attentions" else torch.ones(2, 9, dtype=torch.bool)
    for a, b in zip(found[key], expected[key], strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-5, atol=1e-5)


def test_weights_are_not_read_under_dropout():
    model = FAMILIES["gpt2"].build()
    inputs = FAMILIES["gpt2"].inputs(model)
    model.train()
    with probe(model, PROBES["sink"]()), pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        model(**inputs)
    with steer(model, ScaleHeads(0.5)):
        model(**inputs)  # outputs of heads can be edited all the same


def test_embeddings_in_place_of_ids():
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model, padding="left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with steer(model, BiasGroup(first_token(), 2.0)):
        by_ids = logits(model, inputs)
        by_embeds = logits(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(by_ids, by_embeds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5", "deepseek_v3"])
def test_half_precision_is_as_good_as_the_plain_model(name, dtype):
    """The edited model in half precision is as near to the edited one in float32 as the plain one is to its own."""
    family = FAMILIES[name]
    model = family.build()
    half = copy.deepcopy(model).to(dtype)
    inputs = family.inputs(model, padding="left")
    main = next(iter(family.towers))
    edit = BiasGroup(first_token(), 1.5, heads=f"{main}:all" if main else "all")
    real = inputs["attention_mask"].bool() if main == "" else torch.ones(2, 9, dtype=torch.bool)
    plain_error = (logits(half, inputs).float() - logits(model, inputs))[real].norm()
    with steer(half):
        assert torch.equal(logits(half, inputs), logits(half, inputs))
    with steer(half, edit), steer(model, edit):
        error = (logits(half, inputs).float() - logits(model, inputs))[real].norm()
    assert float(error) <= 2.5 * float(plain_error) + 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_autocast(name):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, padding="left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(model, inputs)
        with steer(model), probe(model, PROBES["sink"](), PROBES["entropy"]()):
            assert torch.equal(logits(model, inputs), plain)
        with steer(model, BiasGroup(first_token(), 1.0), Ablate(["0.0"])):
            assert bool(logits(model, inputs).isfinite().all())


# --- what the function never receives, and who else calls the model -------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_image_tokens_are_those_of_the_prompt(name):
    """Known from ids that attention never sees, and kept while tokens are generated."""
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, 2, 24, "left")
    member = inputs["input_ids"] == IMAGE
    text = {module for module, (tower, _) in attention_modules(model).items() if tower == ""}

    def rule(module: Any, weights: Tensor) -> Tensor:
        return biased(weights, member[:, None, None].expand_as(weights), 1.5) if module in text else weights

    with materialised(model, rule):
        expected = logits(model, inputs)
    with steer(model, BiasGroup(image_tokens(), 1.5)):
        found = logits(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["suppress_tokens"] = [IMAGE, VISION_START, VISION_END, VIDEO]
    made = []
    for group in (image_tokens(), positions(member), None):
        with steer(model, *([] if group is None else [BiasGroup(group, 1.5, when="generated")])):
            made.append(torch.stack(model.generate(**inputs, **options).logits))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0][0], made[2][0]) and not torch.allclose(made[0][1], made[2][1], atol=1e-4)


def test_image_tokens_of_a_model_without_any_are_refused():
    model = FAMILIES["llama"].build()
    with steer(model, BiasGroup(image_tokens(), 1.0)), pytest.raises(ValueError, match="this model has no image token"):
        logits(model, FAMILIES["llama"].inputs(model))


def test_a_new_prompt_resolves_its_groups_anew():
    """One block, several prompts of other lengths and paddings, each with tokens generated after it."""
    model = FAMILIES["llama"].build()
    family = FAMILIES["llama"]
    prompts = [family.inputs(model, 2, 9, "left"), family.inputs(model, 2, 5)]
    wanted = [int(prompts[0]["input_ids"][1, 7]), int(prompts[1]["input_ids"][0, 2])]
    edits = [BiasGroup(tokens(wanted), 2.0), BiasGroup(first_token(), 1.0)]

    def run(inputs: dict[str, Tensor]) -> Tensor:
        made = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(made.logits)

    alone = []
    for inputs in prompts:
        with steer(model, *edits):
            alone.append(run(inputs))
    with steer(model, *edits):
        together = [run(inputs) for inputs in prompts]
        again = run(prompts[0])
    assert all(map(torch.equal, together, alone)) and torch.equal(again, alone[0])
    assert not torch.allclose(alone[0], run(prompts[0]), atol=1e-3)


def test_a_cache_filled_under_an_edit_keeps_its_effect():
    model = FAMILIES["llama"].build()
    ids = FAMILIES["llama"].inputs(model)["input_ids"]
    with torch.no_grad():
        plain = model(ids[:, :-1], **with_cache(model, None))
        with steer(model, Ablate(["0.*"])):
            filled = model(ids[:, :-1], **with_cache(model, None))
        after, untouched = (
            model(ids[:, -1:], **with_cache(model, cache_of(first))).logits for first in (filled, plain)
        )
    assert not torch.allclose(after, untouched, atol=1e-3)
    torch.testing.assert_close(untouched[:, 0], logits(model, {"input_ids": ids})[:, -1], rtol=1e-4, atol=1e-4)


def test_continuous_batching_is_refused():
    """A batch without an axis for its sequences: by transformers where it starts inside, by headwise where it runs."""
    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].inputs(model)
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with steer(model, Ablate(["0.0"])):
        with pytest.raises(ValueError, match="headwise is not supported for continuous batching"):
            model.generate_batch([[8, 9, 10]], generation_config=config)
        with pytest.raises(UnsupportedModel, match="continuous batching is not supported"):
            model(**inputs, read_index=[], write_index=[])
    with torch.no_grad():
        model(**inputs, read_index=[], write_index=[])  # nothing attached: not our business


def test_timm_networks_are_refused_with_what_to_do():
    """They are wrapped by a transformers class, but attend by themselves."""
    model = FAMILIES["vit"].build()
    attention = type("Attention", (torch.nn.Module,), {"__module__": "timm.layers.attention"})
    for path in {record.path for record in heads_of(model)}:
        model.set_submodule(path, attention())
    with pytest.raises(UnsupportedModel, match=r"holds a timm network.*such as ViTModel or Dinov2Model"):
        heads_of(model)
    with pytest.raises(UnsupportedModel, match="holds a timm network"), steer(model, Ablate(["0.0"])):
        pass
