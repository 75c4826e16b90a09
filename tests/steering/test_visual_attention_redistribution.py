"""VAR: the identities of its rule, the models it runs in against the rule written out, and what it refuses."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.models_under_test import text, tiny_llama
from tests.steering.pictures import LAYERS, batch, build, defined, logits
from tests.zoo import IMAGE
from torch import Tensor

import headwise as hw
from headwise._edits import make_edit
from headwise.attend.addresses import Layout
from headwise.attend.edits import EditRows, ScaleHeads
from headwise.attend.groups import image_tokens, positions, spans
from headwise.attend.saving import load_edits, save_edits
from headwise.errors import InputError, UnsupportedModel
from headwise.heads.sinks import find_sinks
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.maps import attention_maps
from headwise.hf.session import steer
from headwise.steering.visual_attention_redistribution import (
    VisualAttentionRedistribution,
    image_centric_rows,
    redistribute_attention,
    visual_non_sink_ratio,
)

TAU = 2.3  # of a bound of sqrt(32) = 5.7: some image tokens of the random models pass it
NAMES = ("llava", "qwen2_vl")
VAR = VisualAttentionRedistribution


def var(**options: Any) -> VisualAttentionRedistribution:
    chosen: dict[str, Any] = {"sink_threshold": TAU, "layers": LAYERS, "min_image_mass": 0.05, "non_sink_ratio": 0.3}
    return VAR(**{**chosen, **options})


def steered(model: Any, *edits: Any, **inputs: Any) -> Tensor:
    with steer(model, *edits):
        return logits(model, **inputs)


def maps(seed: int = 0, strength: float = 2.0, shape: tuple[int, ...] = (1, 8, 40, 40)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = strength * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def masks(b: int = 1, s: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks (the first token and two image tokens), image tokens 3..27, rows after them."""
    sinks, image, rows = (torch.zeros(b, s, dtype=torch.bool) for _ in range(3))
    sinks[:, [0, 7, 20]] = True
    image[:, 3:28] = True
    rows[:, 28:] = True
    return sinks, image, rows


# The published rule, head by head and row by row


def loop(
    weights: Tensor, sinks: Tensor, image: Tensor, rows: Tensor, transfer: float, rho: float, least: float
) -> Tensor:
    """The authors' loop for each item of a batch. rho: the most that sinks may hold of the mass on the image."""
    new = weights.clone()
    for b in range(weights.shape[0]):
        every = [t for t in range(weights.shape[-1]) if sinks[b, t]]
        tokens = [t for t in range(weights.shape[-1]) if image[b, t]]
        visual = [t for t in every if t in tokens]
        others = [t for t in tokens if t not in visual]
        for h in range(weights.shape[1]):
            for q in range(weights.shape[2]):
                seen = [t for t in visual if float(weights[b, h, q, t]) > 0]
                if not rows[b, q] or not seen:
                    continue
                row = weights[b, h, q]
                mass = sum(float(row[t]) for t in tokens)
                share = sum(float(row[t]) for t in visual) / (mass + len(tokens) * 1e-6)
                if share > rho or mass < least:
                    continue
                budget = sum(transfer * float(row[t]) for t in every)
                left = sum(float(row[t]) for t in others)
                for t in every:
                    new[b, h, q, t] = row[t] * (1 - transfer)
                for t in others:
                    new[b, h, q, t] = row[t] + budget * float(row[t]) / left
    return new


@pytest.mark.parametrize("transfer", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("rho", [0.2, 0.5])
def test_the_published_loop(transfer, rho):
    a = maps()
    sinks, image, rows = masks()
    found = redistribute_attention(
        a, sinks, image, transfer=transfer, non_sink_ratio=1 - rho, min_image_mass=0.2, rows=rows
    )
    expected = loop(a, sinks, image, rows, transfer, rho, 0.2)
    assert not torch.equal(expected, a)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_items_of_a_batch_have_sinks_of_their_own():
    """The authors' code drops the batch axis of its indices."""
    a = maps(shape=(3, 4, 40, 40))
    sinks, image, rows = masks(3)
    sinks[1] = False
    sinks[2] = False
    sinks[2, [1, 12]] = True
    found = redistribute_attention(a, sinks, image, transfer=0.5, rows=rows)
    torch.testing.assert_close(found, loop(a, sinks, image, rows, 0.5, 0.5, 0.2), atol=1e-9, rtol=0)
    assert torch.equal(found[1], a[1])
    for item in range(3):
        alone = redistribute_attention(
            a[item : item + 1], sinks[item : item + 1], image[item : item + 1], transfer=0.5, rows=rows[item : item + 1]
        )
        assert torch.equal(alone[0], found[item])


@given(st.integers(0, 50), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 8))
@settings(max_examples=40, deadline=None)
def test_what_the_rule_keeps(seed, transfer, ratio, least, strength):
    a = maps(seed, strength, (2, 3, 16, 16))
    sinks, image = torch.zeros(2, 2, 16, dtype=torch.bool).unbind(0)
    sinks[:, [0, 5]] = True
    image[:, 3:10] = True
    new = redistribute_attention(a, sinks, image, transfer=transfer, non_sink_ratio=ratio, min_image_mass=least)
    torch.testing.assert_close(new.sum(-1), a.sum(-1), atol=1e-6, rtol=0)
    outside = ~(sinks | image)[:, None, None].expand_as(a)
    assert torch.equal(new[outside], a[outside])
    others = (image & ~sinks)[0]
    order = a[..., others].argsort(dim=-1, stable=True)
    sorted_ = new[..., others].gather(-1, order)
    assert (sorted_.diff(dim=-1) >= 0).all(), "the order of the other image tokens is kept"
    assert (new[..., others] >= a[..., others]).all() and (new[..., sinks[0]] <= a[..., sinks[0]]).all()


def test_it_is_a_bias_on_scores():
    """Multiplying weights is adding logarithms, and nothing is lost to renormalising."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 8, 40, 16, generator=generator) for _ in range(3))
    seen = torch.ones(40, 40).tril().bool()
    a = (q @ k.mT / 4).masked_fill(~seen, -math.inf).softmax(-1)
    sinks, image, rows = masks()
    new = redistribute_attention(a, sinks, image, transfer=0.4, rows=rows)
    centric = image_centric_rows(a, sinks, image) & rows[:, None]
    assert centric.any() and not centric.all()
    others = image & ~sinks
    moved = 0.4 * (a * sinks[:, None, None]).sum(-1) / (a * others[:, None, None]).sum(-1)
    change = torch.where(sinks[:, None, None], math.log(0.6), 0.0)
    change = torch.where(others[:, None, None], (1 + moved).log()[..., None], change)
    bias = torch.where(centric[..., None], change, 0.0).masked_fill(~seen, -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(new @ v, expected, atol=1e-5, rtol=1e-5)


def test_transfer_0_is_the_same_tensor_and_half_precision_is_worked_in_single():
    a = maps().float()
    sinks, image, _ = masks()
    assert redistribute_attention(a, sinks, image, transfer=0.0) is a
    half = redistribute_attention(a.bfloat16(), sinks, image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), redistribute_attention(a, sinks, image), atol=1e-2, rtol=2e-2)


def test_rows_without_another_place_stay_as_they_are():
    a = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]]])
    sinks, image = torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])
    assert torch.equal(redistribute_attention(a, sinks, image, non_sink_ratio=0.0), a)
    none = torch.tensor([[True, False, False]])  # a sink, but not in the image
    assert torch.equal(redistribute_attention(a, none, image, non_sink_ratio=0.0), a)


def test_the_share_off_the_sinks():
    a = torch.tensor([[[[0.1, 0.3, 0.1, 0.5]]]])
    sinks, image = torch.tensor([[True, True, False, False]]), torch.tensor([[False, True, True, False]])
    assert float(visual_non_sink_ratio(a, sinks, image)) == pytest.approx(0.25, abs=1e-4)
    assert bool(image_centric_rows(a, sinks, image, non_sink_ratio=0.24))
    assert not bool(image_centric_rows(a, sinks, image, non_sink_ratio=0.26))
    assert not bool(image_centric_rows(a, sinks, image, non_sink_ratio=0.0, min_image_mass=0.45))


# In a model


def phi(x: Tensor, dims: Any = None) -> list[list[float]]:
    """max |x_j| / RMS(x), token by token."""
    found = []
    for item in x:
        values = []
        for token in item.tolist():
            rms = math.sqrt(sum(v * v for v in token) / len(token) + 1e-6)
            values.append(max(abs(v) for j, v in enumerate(token) if dims is None or j in dims) / rms)
        found.append(values)
    return found


def rule_of(inputs: dict[str, Tensor], edit: VisualAttentionRedistribution, layers: Any = None) -> Any:
    """The rule on whole rows of a forward without a cache. Rows are text with an image and a visual sink before."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    image = (ids == IMAGE) & real
    picked: Any = edit.layers if layers is None else layers
    chosen = range(8)[picked]

    def rule(layer: int, weights: Tensor, x: Tensor) -> Tensor:
        if layer not in chosen:
            return weights
        dims = edit.sink_dims
        sinks = torch.tensor([[v > edit.sink_threshold for v in item] for item in phi(x, dims)]) & real
        rows = (image.cumsum(-1) > 0) & ((image & sinks).cumsum(-1) > 0) & ~image & real
        return loop(weights, sinks, image, rows, edit.transfer, 1 - edit.non_sink_ratio, edit.min_image_mass)

    return rule


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompts", [("bwPwwww",), ("bwPwwww", "bPww", "bwwPwPww"), ("bwwPwww", "bwww")])
def test_a_model_under_the_edit_is_the_rule_written_out(name, prompts):
    """Grouped keys; batches of unequal lengths, padded on the left; several pictures; a row without any."""
    model, inputs = build(name), batch(name, *prompts)
    assert model.config.text_config.num_key_value_heads < model.config.text_config.num_attention_heads
    edit = var()
    plain = logits(model, **inputs)
    found = steered(model, edit, **inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert (found - plain)[real].abs().max() > 1e-2, "the edit does something here"
    expected = defined(model, inputs, rule_of(inputs, edit))
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    before = (inputs["input_ids"] == IMAGE).cumsum(-1) == 0
    assert torch.equal(found[before & real], plain[before & real]), "what comes before the image is not touched"


@pytest.mark.parametrize("options", [
    {"transfer": 1.0},
    {"sink_dims": (3, 17, 20, 28), "sink_threshold": 1.5},
    {"layers": slice(1, None)},
    {"layers": [0]},
    {"non_sink_ratio": 0.8},
    {"min_image_mass": 0.5},
])  # fmt: skip
def test_each_option_is_that_of_the_rule(options):
    model, inputs, edit = build("llava"), batch("llava", "bwPwwwwww", "bPwwww"), var(**options)
    real = inputs["attention_mask"].bool()
    found = steered(model, edit, **inputs)
    layers = slice(0, 1) if options.get("layers") == [0] else None
    expected = defined(model, inputs, rule_of(inputs, edit, layers))
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, steered(model, var(transfer=0.3), **inputs))


def test_it_is_the_rule_at_any_precision():
    model, inputs = build("llava"), batch("llava", "bwPwwwwww", "bPwwww")
    real = inputs["attention_mask"].bool()
    exact = steered(model, var(), **inputs)
    double = build("llava").double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    torch.testing.assert_close(
        steered(double, var(), **wide)[real], defined(double, wide, rule_of(wide, var()))[real], atol=1e-9, rtol=1e-9
    )
    half = build("llava").bfloat16()
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    group = positions(find_sinks(model, inputs, threshold=TAU, layers=LAYERS).members[:, 0])  # rounding moves no token
    exact = steered(model, var(sinks=group), **inputs)[real]
    error = (steered(half, var(sinks=group), **narrow).float()[real] - exact).norm() / exact.norm()
    own = (logits(half, **narrow).float()[real] - logits(model, **inputs)[real]).norm() / exact.norm()
    assert error <= 3 * own + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_neutral_and_text_alone_are_the_plain_model_bit_for_bit(name):
    model, inputs = build(name), batch(name, "bwPwww", "bPw")
    assert VAR(transfer=0.0).neutral
    assert torch.equal(steered(model, var(transfer=0.0), **inputs), logits(model, **inputs))
    words = batch(name, "bwwwww", "bww")
    assert torch.equal(steered(model, var(), **words), logits(model, **words))


def test_without_a_sink_it_does_nothing_and_says_so():
    model, inputs = build("llava"), batch("llava", "bwPwww")
    plain = logits(model, **inputs)
    with pytest.warns(UserWarning, match=r"no image token passes sink_threshold 5.5 \(the largest .* was [1-4]\.\d\)"):
        found = steered(model, var(sink_threshold=5.5), **inputs)
    assert torch.equal(found, plain)
    group = positions([0])
    with pytest.warns(UserWarning, match="no image token is in sinks, so attention was left as it is"):
        assert torch.equal(steered(model, var(sinks=group), **inputs), plain)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert torch.equal(steered(model, VAR(layers=LAYERS), **inputs), plain)
    assert "sink_threshold is 20, but with a hidden size of 32 no token can pass sqrt(32) = 5.7" in str(
        heard[0].message
    )


def test_only_text_after_the_image_pays():
    """Rows before the first that is touched are not computed again."""
    from headwise.attend import machine

    model, inputs = build("llava"), batch("llava", "bwwwwwwPww")
    seen = []
    before = machine.split_and_merge
    machine.split_and_merge = lambda call, edits, skip: seen.append(call.q.shape[2] - skip) or before(call, edits, skip)
    try:
        steered(model, var(sinks=positions([8, 9])), **inputs)
    finally:
        machine.split_and_merge = before
    assert seen == [2, 2]


def test_state_lives_in_the_context():
    """Two models, one edit; two prompts, one context; a context after another."""
    edit = var()
    one, two = build("llava"), build("llava", 1)
    first, second = batch("llava", "bwPwww"), batch("llava", "bPwwwww", seed=9)
    alone = [steered(model, var(), **inputs) for model, inputs in ((one, first), (two, second), (one, second))]
    with steer(one, edit), steer(two, edit):
        assert torch.equal(logits(one, **first), alone[0])
        assert torch.equal(logits(two, **second), alone[1])
        assert torch.equal(logits(one, **second), alone[2])
        assert torch.equal(logits(one, **first), alone[0])
    assert torch.equal(steered(one, edit, **second), alone[2])


def test_it_composes_with_other_edits_and_with_rows():
    model, inputs = build("llava"), batch("llava", "bwPwwww")
    scale = ScaleHeads(scale=0.5, heads="1.2")
    both = steered(model, var(), scale, **inputs)
    with steer(model, var()):
        torch.testing.assert_close(steered(model, scale, **inputs), both, atol=1e-6, rtol=1e-6)
    rows = EditRows(lambda weights, rows: weights)  # the same heads by whole rows of weights
    torch.testing.assert_close(
        steered(model, var(), rows, **inputs), steered(model, var(), **inputs), atol=1e-5, rtol=1e-5
    )
    with steer(model, var()):
        seen = attention_maps(model, inputs)
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen.sum(-1)), atol=1e-5, rtol=0)


# Decoding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_one_forward_over_the_whole_text(name, beams):
    """Sinks found in the prompt are kept; generated tokens are never sinks; padding and beams move nothing."""
    model = build(name)
    prompts = ("bwPwww", "bPw", "bwPwPww")
    twin, inputs = copy.deepcopy(model), batch(name, *prompts)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "suppress_tokens": [IMAGE]}
    with steer(model, var()):
        together = model.generate(**inputs, **options)
        width = inputs["input_ids"].shape[1]
        for i, prompt in enumerate(prompts):
            single = batch(name, prompt, seed=i)
            alone = model.generate(**single, **options)
            n = single["input_ids"].shape[1]
            assert torch.equal(together[i, width:], alone[0, n:])
            if beams > 1:
                continue
            scores = model.generate(**single, **options, output_scores=True, return_dict_in_generate=True).scores
            whole = {**single, "input_ids": alone}
            if name != "llava":
                whole["mm_token_type_ids"] = (alone == IMAGE).long()
            full = logits(model, **whole)
            edit = var()
            rule = rule_of(whole, edit)
            kept = (torch.arange(alone.shape[1]) < n)[None]

            def frozen(layer: int, weights: Tensor, x: Tensor, rule: Any = rule, kept: Tensor = kept) -> Tensor:
                return rule(layer, weights, torch.where(kept[..., None], x, torch.ones_like(x)))

            expected = defined(twin, whole, frozen)
            found = torch.stack(scores, 1)
            shown = torch.isfinite(found)
            torch.testing.assert_close(found[shown], expected[:, n - 1 : -1][shown], atol=2e-5, rtol=1e-4)
            assert full.shape == expected.shape


def test_a_static_cache_longer_than_the_text():
    """Columns of the cache are not positions of the prompt."""
    model, inputs = build("llava"), batch("llava", "bwPwww", "bPw")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
    with steer(model, var()):
        dynamic = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("cut", [2, 6, 8])
def test_a_prompt_in_chunks(cut):
    model, inputs = build("llava"), batch("llava", "bwPwwwww", "bwPwwwww")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad(), steer(model, var()):
        full = model(**inputs).logits
        out = model(input_ids=ids[:, :cut], use_cache=True, **({"pixel_values": pixels} if cut > 2 else {}))
        rest = {"pixel_values": pixels} if cut == 2 else {}
        second = model(input_ids=ids[:, cut:], **rest, **with_cache(model, cache_of(out)))
    torch.testing.assert_close(torch.cat([out.logits, second.logits], 1), full, atol=1e-5, rtol=1e-5)


def test_generated_tokens_alone():
    model, inputs = build("llava"), batch("llava", "bwPwww")
    plain = logits(model, **inputs)
    with torch.no_grad(), steer(model, var(when="generated")):
        out = model(**inputs, use_cache=True)
        assert torch.equal(out.logits, plain)
        step = model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache_of(out))).logits
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        unedited = model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache)).logits
    assert (step - unedited).abs().max() > 1e-3


# Finding sinks, names, files


def test_the_first_two_layers_and_the_last_are_left_out():
    """The authors' code means to skip the last layer, and does not."""
    (edit,) = VAR().primitives()
    layers = {head.layer for head in edit.named(Layout.of([4] * 6))}
    assert layers == {2, 3, 4}
    (named,) = VAR(heads="1.*,3.2,5.0").primitives()
    assert [str(head) for head in named.named(Layout.of([4] * 6))] == ["3.2"]


def test_given_sinks_are_those_found():
    """A single layer: what `find_sinks` found there is what the edit finds by itself."""
    model, inputs = build("llava"), batch("llava", "bwPwwww", "bPww")
    found = find_sinks(model, inputs, threshold=TAU, layers=[1])
    by_itself = steered(model, var(layers=[1]), **inputs)
    given_ = steered(model, var(layers=[1], sinks=found.group(1)), **inputs)
    assert torch.equal(by_itself, given_)


def test_text_stands_for_an_image_where_a_group_says_so():
    model, ids = tiny_llama(), text(2, 11)
    edit = VAR.example()
    found = steered(model, edit, input_ids=ids)
    sinks, image, rows = (torch.zeros(2, 11, dtype=torch.bool) for _ in range(3))
    sinks[:, 2:4] = image[:, 1:6] = rows[:, 6:] = True
    same = EditRows(
        lambda weights, at: redistribute_attention(
            weights, sinks, image, transfer=0.9, non_sink_ratio=0.0, min_image_mass=0.0, rows=rows[:, at.index]
        ),
        heads=["0.1", "1.2"],
    )
    torch.testing.assert_close(found, steered(model, same, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_it_has_a_name_on_the_command_line_and_in_files(tmp_path):
    edit = make_edit("visual-attention-redistribution:transfer=0.4,layers=1:-1,sink_dims=3+9,image=spans:1-5", {})
    assert isinstance(edit, VAR)
    assert (edit.transfer, edit.layers, edit.sink_dims, edit.image) == (0.4, slice(1, -1), (3, 9), spans([(1, 6)]))
    with pytest.raises(InputError, match=r"transfer is 2.0; it must lie in 0..1"):
        make_edit("visual-attention-redistribution:transfer=2", {})
    with pytest.raises(InputError, match=r"layers is 'two'; expected .*2:-1"):
        make_edit("visual-attention-redistribution:layers=two", {})
    path = str(tmp_path / "edits.json")
    save_edits([edit, var(sinks=spans([(3, 4)]))], path)
    again = load_edits(path, {"VisualAttentionRedistribution": VAR})
    assert again == [edit, var(sinks=spans([(3, 4)]))]
    assert hw.steering.VisualAttentionRedistribution is VAR


# Refusals


def test_what_is_refused():
    for name in ("transfer", "non_sink_ratio", "min_image_mass"):
        for value in (-0.1, 1.2, math.nan):
            with pytest.raises(ValueError, match=rf"{name} is {value}; it must lie in 0\.\.1"):
                wrong: Any = {name: value}
                VAR(**wrong)
    with pytest.raises(ValueError, match="sink_threshold is -1"):
        VAR(sink_threshold=-1.0)
    with pytest.raises(TypeError, match="image"):
        VAR(image=torch.ones(1, 3).bool())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="layers"):
        VAR(layers="2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"transfer is 1.5"):
        redistribute_attention(maps(), *masks()[:2], transfer=1.5)
    model = build("llava")
    with pytest.raises(ValueError, match=r"dimension 32 is out of range; the hidden size is 32, so 0 to 31"):
        steered(model, var(sink_dims=[32]))
    with pytest.raises(ValueError, match="layer 2 is out of range; the model has 2 layers"):
        steered(model, var(layers=[0, 2]))
    with pytest.raises(ValueError, match=r"layers is slice\(2, -1, None\), which leaves none"):
        steered(model, var(layers=slice(2, -1)))
    with pytest.raises(ValueError, match=r"heads names vision:0.1; only heads of the text decoder"):
        steered(model, var(heads="vision:0.1"))
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: its config names no image token"):
        steered(tiny_llama(), var(), input_ids=text())
    inputs = batch("llava", "bwPwww")
    assert torch.equal(logits(model, **inputs), logits(model, **inputs))
    assert model.config._attn_implementation == "sdpa", "a refusal leaves nothing behind"
    assert image_tokens() == VAR().image


def test_flash_attention_is_not_needed():
    """Weights are not asked for: the edit works whatever computes the attention of the other heads."""
    model, inputs = build("llava"), batch("llava", "bwPwww")
    fused = steered(model, var(), **inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(steered(model, var(), **inputs), fused, atol=1e-5, rtol=1e-5)
