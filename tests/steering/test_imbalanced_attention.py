"""Imbalanced attention: the identities of its rule, the models it runs in against the rule written out, refusals."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.models_under_test import text, tiny_llama
from tests.hf.reference import materialised
from tests.steering.pictures import LAYERS, batch, build, defined, logits
from tests.zoo import IMAGE
from torch import Tensor, nn

from headwise._edits import make_edit
from headwise.attend.edits import BiasGroup, EditRows, ScaleHeads
from headwise.attend.groups import image_tokens, positions, spans
from headwise.attend.saving import load_edits, save_edits
from headwise.errors import InputError, UnsupportedModel
from headwise.heads.masses import group_mass
from headwise.heads.vision_tokens import choose_informed, informed_tokens, outlier_tokens
from headwise.hf.images import image_positions, without
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.maps import attention_maps
from headwise.hf.session import steer
from headwise.steering.imbalanced_attention import (
    ImageTokenBoost,
    ImbalancedAttention,
    boost_scores,
    image_guidance,
    sensitivity_scale,
)

NAMES = ("llava", "qwen2_vl")


def paint(**options: Any) -> ImbalancedAttention:
    chosen: dict[str, Any] = {"layers": LAYERS, "local_ratio": 0.5, "summary_layer": -1}
    return ImbalancedAttention(**{**chosen, **options})


def steered(model: Any, *edits: Any, **inputs: Any) -> Tensor:
    with steer(model, *edits):
        return logits(model, **inputs)


# The rule


def released(z: Tensor, local: list[int], summary: list[int], alpha: float, beta: float) -> Tensor:
    """The authors' edit of the last row, key by key."""
    new = z.clone()
    for h in range(z.shape[0]):
        for k in local:
            new[h, -1, k] = alpha * abs(float(z[h, -1, k])) + z[h, -1, k]
        for k in summary:
            new[h, -1, k] = beta * abs(float(z[h, -1, k])) + z[h, -1, k]
    return new


def test_the_released_row_edit():
    z = 3 * torch.randn(1, 8, 5, 30, generator=torch.Generator().manual_seed(0))
    local, summary = torch.zeros(2, 1, 30, dtype=torch.bool).unbind(0)
    local[:, [4, 7, 9]] = summary[:, [5, 20]] = True
    found = boost_scores(z, local, summary, alpha=0.7, beta=0.3)
    torch.testing.assert_close(found[0, :, -1], released(z[0], [4, 7, 9], [5, 20], 0.7, 0.3)[:, -1], atol=1e-6, rtol=0)


@given(st.integers(0, 30), st.floats(0, 2), st.floats(0, 2), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_scores_never_fall_and_the_others_keep_their_ratio(seed, alpha, more, strength):
    z = strength * torch.randn(1, 3, 2, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    local, none = torch.zeros(2, 1, 12, dtype=torch.bool).unbind(0)
    local[:, 2:6] = True
    less = boost_scores(z, local, none, alpha=alpha)
    most = boost_scores(z, local, none, alpha=alpha + more)
    assert (less >= z).all() and (most >= less).all()
    a, b = less.softmax(-1), most.softmax(-1)
    assert (b[..., 2:6].sum(-1) >= a[..., 2:6].sum(-1) - 1e-12).all(), "the mass on the set does not fall in alpha"
    torch.testing.assert_close(b[..., 7] / b[..., 8], a[..., 7] / a[..., 8])
    assert torch.equal(boost_scores(z, local, none, alpha=0.0), z)


@given(st.floats(0, 5), st.floats(-8, 8))
def test_the_bias_mode_on_one_row(c, middle):
    """m -> m e^c / (1 - m + m e^c)."""
    z = torch.tensor([[[[0.3, -1.0, middle, 2.0]]]], dtype=torch.float64)
    local, none = torch.tensor([[False, True, True, False]]), torch.zeros(1, 4, dtype=torch.bool)
    m = z.softmax(-1)[..., 1:3].sum()
    found = boost_scores(z, local, none, alpha=c, mode="bias").softmax(-1)[..., 1:3].sum()
    torch.testing.assert_close(found, m * math.exp(c) / (1 - m + m * math.exp(c)))


def test_the_absolute_value_depends_on_the_offset_of_a_row_and_the_bias_does_not():
    """A trap: softmax does not see an offset, the paper's rule does."""
    z = torch.tensor([[[[0.0, -8.0, 1.0]]]])
    local, none = torch.tensor([[True, True, False]]), torch.zeros(1, 3, dtype=torch.bool)
    raised = boost_scores(z, local, none, alpha=0.7)
    torch.testing.assert_close(raised, torch.tensor([[[[0.0, -2.4, 1.0]]]]))
    modes: Any = (("abs", False), ("bias", True))
    for mode, same in modes:
        here, there = (boost_scores(x, local, none, alpha=0.7, mode=mode).softmax(-1) for x in (z, z + 5))
        assert torch.allclose(here, there, atol=1e-6) == same


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_hidden_keys_stay_hidden(hidden):
    z = torch.tensor([[[[1.0, hidden, 2.0]]]])
    local, none = torch.tensor([[True, True, False]]), torch.zeros(1, 3, dtype=torch.bool)
    for mode in ("abs", "bias"):
        found = boost_scores(z, local, none, alpha=0.7, mode=mode)
        assert float(found[0, 0, 0, 1]) == hidden and torch.isfinite(found[..., [0, 2]]).all()


# Informed tokens


@given(st.integers(0, 200), st.integers(4, 40))
def test_outliers_as_numpy_has_them(seed, v):
    scores = torch.randn(v, generator=torch.Generator().manual_seed(seed)).exp() ** 2
    low, high = np.percentile(scores.double().numpy(), [25, 75])
    expected = scores.double().numpy() > high + 1.5 * (high - low)
    assert outlier_tokens(scores).tolist() == expected.tolist()


def test_local_and_summary_tokens_are_disjoint():
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 100], [1, 1, 1, 1, 1, 1, 1, 1]])
    local, summary = choose_informed(scores, scores, 0.25)
    assert summary.tolist() == [[False] * 7 + [True], [False] * 8]
    assert local[0].nonzero().flatten().tolist() == [6] and int(local[1].sum()) == 2
    assert not (local & summary).any()
    assert int(choose_informed(scores, scores, 0.0)[0].sum()) == 0
    full = choose_informed(scores, scores, 1.0)
    assert (full[0] | full[1]).all()


def tower_maps(model: Any, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """Layer -> picture -> attention `[h t t]` of the vision tower, from an implementation of our own."""
    modules = [module for name, module in model.named_modules() if "vis" in name and name.endswith(("attn",))]
    with materialised(model) as run:
        logits(model, **inputs)
    return [[w for call in run.of(module) for w in call.weights] for module in modules]


def expected_tokens(name: str, model: Any, inputs: dict[str, Tensor], edit: ImbalancedAttention) -> list[Tensor]:
    """Local and summary tokens `[b s]` from whole attention maps, picture by picture."""
    every = tower_maps(model, inputs)
    images = inputs["input_ids"] == IMAGE
    found = [torch.zeros_like(images), torch.zeros_like(images)]
    places = images.nonzero().view(-1, 4, 2)
    for number, place in enumerate(places):
        scores = []
        for layer in (edit.local_layer, edit.summary_layer):
            a = every[layer][number]
            if name == "llava":
                score = a.sum(0)[0, 1:] if edit.rule != "received" else a.sum(0).mean(0)[1:]
            else:
                score = a.sum(0).mean(0).view(-1, 4).mean(-1)
            scores.append(score)
        low, high = np.percentile(scores[1].numpy(), [25, 75])
        summary = scores[1] > high + 1.5 * (high - low)
        order = scores[0].argsort(descending=True)[: int(edit.local_ratio * len(scores[0]))]
        for token, (b, s) in enumerate(place.tolist()):
            found[1][b, s] = summary[token]
            found[0][b, s] = token in order and not summary[token]
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["auto", "received"])
def test_informed_tokens_against_whole_maps(name, rule):
    """A CLS token or none; one set for every picture; several pictures in a row."""
    model, inputs = build(name), batch(name, "bwPwwPw", "bPww", "bwwPw")
    edit = paint(rule=rule)
    found = informed_tokens(model, inputs, local_ratio=0.5, summary_layer=-1, rule=rule)
    local, summary = expected_tokens(name, model, inputs, edit)
    assert torch.equal(found.local, local) and torch.equal(found.summary, summary)
    assert int(found.local.sum()) >= 4 and not (found.local & ~(inputs["input_ids"] == IMAGE)).any()
    sets = {tuple(row.nonzero().flatten().tolist()) for row in found.local}
    assert len(sets) == 3, "every picture has tokens of its own"
    assert found.group("local") != found.group("summary")


def test_only_two_rows_of_the_tower_are_formed():
    """No weights of the tower are asked for, and no attention implementation is changed."""
    from headwise.attend.call import Call

    model, inputs = build("llava"), batch("llava", "bwPww")
    seen: list[tuple[str, int]] = []
    before = Call.scores

    def scores(self: Call, rows: Any, columns: Any = None) -> Tensor:
        found = before(self, rows, columns)
        seen.append((self.tower, found.shape[2]))
        return found

    Call.scores = scores
    try:
        informed_tokens(model, inputs, summary_layer=-1)
    finally:
        Call.scores = before
    assert seen == [("vision", 1), ("vision", 1)]


# In a model


def rule_of(inputs: dict[str, Tensor], edit: ImbalancedAttention, sets: list[Tensor], rows: Tensor) -> Any:
    """Weights of some rows get exp(s |z|) and are divided by their sum; the caller rebuilds scores z `[b h t s]`."""

    def rule(layer: int, weights: Tensor, z: Tensor) -> Tensor:
        chosen: Any = edit.layers
        if layer not in range(8)[chosen]:
            return weights
        new = weights.clone()
        for b in range(weights.shape[0]):
            for h in range(weights.shape[1]):
                scale = 1.0 if edit.head_scale is None else float(edit.head_scale[layer, h])
                for t in range(weights.shape[2]):
                    if not rows[b, t] or not (sets[0][b] | sets[1][b]).any():
                        continue
                    raised = weights[b, h, t].clone()
                    for members, strength in zip(sets, (edit.local, edit.summary), strict=True):
                        for k in members[b].nonzero().flatten().tolist():
                            size = abs(float(z[b, h, t, k])) if edit.mode == "abs" else 1.0
                            raised[k] = raised[k] * math.exp(strength * scale * size)
                    new[b, h, t] = raised / raised.sum()
        return new

    return rule


def written_out(model: Any, inputs: dict[str, Tensor], rule: Any) -> Tensor:
    """Logits with `rule(layer, weights, scores)`: scores `[b h t s]` come from the layer's own projections."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rotary: dict[int, Any] = {}
    hooks = []
    for number, layer in enumerate(model.model.language_model.layers):

        def keep(_: nn.Module, args: tuple, kwargs: dict, number: int = number) -> None:
            rotary[number] = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])

        hooks.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))

    def change(layer: int, weights: Tensor, _: Tensor) -> Tensor:
        attention = model.model.language_model.layers[layer].self_attn
        x, (cosine, sine) = rotary[layer]
        b, t, _ = x.shape
        q = attention.q_proj(x).view(b, t, -1, attention.head_dim).transpose(1, 2)
        k = attention.k_proj(x).view(b, t, -1, attention.head_dim).transpose(1, 2)
        if cosine.ndim == 4:  # Qwen2-VL: three sections
            from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

            apply_multimodal_rotary_pos_emb: Any = getattr(qwen, "apply_multimodal_rotary_pos_emb")  # noqa: B009
            sections = model.config.text_config.rope_parameters["mrope_section"]
            q, k = apply_multimodal_rotary_pos_emb(q, k, cosine, sine, sections)
        else:
            q, k = apply_rotary_pos_emb(q, k, cosine, sine)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return rule(layer, weights, (q.double() @ k.double().mT) * attention.head_dim**-0.5)

    try:
        return defined(model, inputs, change)
    finally:
        for hook in hooks:
            hook.remove()


def last_rows(inputs: dict[str, Tensor]) -> Tensor:
    rows = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    rows[:, -1] = True
    return rows


def text_rows(inputs: dict[str, Tensor]) -> Tensor:
    image = inputs["input_ids"] == IMAGE
    return (image.cumsum(-1) > 0) & ~image


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompts", [("bwPwww",), ("bwPwPww", "bPw", "bwww")])
@pytest.mark.parametrize("mode", ["abs", "bias"])
@pytest.mark.parametrize("queries", ["last", "text"])
def test_a_model_under_the_edit_is_the_rule_written_out(name, prompts, mode, queries):
    """Grouped keys; unequal rows, padded on the left; several pictures; a row without any."""
    model, inputs = build(name), batch(name, *prompts)
    edit = paint(mode=mode, queries=queries, local=0.9, summary=0.4)
    plain, found = logits(model, **inputs), steered(model, edit, **inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert (found - plain)[real].abs().max() > 1e-2, "the edit does something here"
    sets = expected_tokens(name, model, inputs, edit)
    rows = last_rows(inputs) if queries == "last" else text_rows(inputs)
    expected = written_out(model, inputs, rule_of(inputs, edit, sets, rows))
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[~rows & real], plain[~rows & real]) or queries == "text"


@pytest.mark.parametrize("options", [
    {"layers": slice(1, None)},
    {"head_scale": torch.tensor([[0.0, 0.5, 1.0, 2.0], [1.0, 0.2, 0.0, 1.5]])},
    {"head_scale": torch.tensor([[0.0, 0.5, 1.0, 2.0], [1.0, 0.2, 0.0, 1.5]]), "mode": "bias"},
    {"local": 0.0},
    {"local_ratio": 1.0, "summary": 0.0},
])  # fmt: skip
def test_each_option_is_that_of_the_rule(options):
    model, inputs = build("llava"), batch("llava", "bwPwww", "bPww")
    real, edit = inputs["attention_mask"].bool(), paint(queries="text", **options)
    sets = expected_tokens("llava", model, inputs, edit)
    expected = written_out(model, inputs, rule_of(inputs, edit, sets, text_rows(inputs)))
    torch.testing.assert_close(steered(model, edit, **inputs)[real], expected[real], atol=1e-5, rtol=1e-5)


def test_it_is_the_rule_at_any_precision():
    model, inputs = build("llava"), batch("llava", "bwPwww", "bPww")
    real = inputs["attention_mask"].bool()
    sets = expected_tokens("llava", model, inputs, paint())
    double = build("llava").double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for mode in ("abs", "bias"):
        edit = paint(mode=mode, queries="text")
        expected = written_out(double, wide, rule_of(wide, edit, sets, text_rows(inputs)))
        torch.testing.assert_close(steered(double, edit, **wide)[real], expected[real], atol=1e-9, rtol=1e-9)
        given_ = paint(mode=mode, queries="text", local_group=positions(sets[0]), summary_group=positions(sets[1]))
        half = build("llava").bfloat16()
        narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = steered(model, given_, **inputs)[real]
        torch.testing.assert_close(exact, steered(model, edit, **inputs)[real], atol=1e-6, rtol=1e-6)
        error = (steered(half, given_, **narrow).float()[real] - exact).norm() / exact.norm()
        own = (logits(half, **narrow).float()[real] - logits(model, **inputs)[real]).norm() / exact.norm()
        assert error <= 3 * own + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_neutral_and_text_alone_are_the_plain_model_bit_for_bit(name):
    model, inputs = build(name), batch(name, "bwPwww", "bPw")
    for edit in (paint(local=0.0, summary=0.0), ImageTokenBoost(alpha=0.0)):
        assert edit.neutral
        assert torch.equal(steered(model, edit, **inputs), logits(model, **inputs))
    words = batch(name, "bwwwww", "bww")
    for edit in (paint(), paint(mode="bias"), ImageTokenBoost(layers=LAYERS)):
        assert torch.equal(steered(model, edit, **words), logits(model, **words))


@pytest.mark.parametrize("mode", ["abs", "bias"])
def test_all_image_tokens_is_the_special_case(mode):
    model, inputs = build("llava"), batch("llava", "bwPwPw", "bPww")
    boost = steered(model, ImageTokenBoost(0.6, mode=mode, layers=LAYERS), **inputs)
    same = paint(local=0.6, summary=0.6, mode=mode, local_ratio=1.0)
    torch.testing.assert_close(boost, steered(model, same, **inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(boost, steered(model, paint(local=0.6, summary=0.0, tokens="all", mode=mode), **inputs))
    if mode == "bias":
        rows = last_rows(inputs)
        bias = BiasGroup(image_tokens(), 0.6, when=lambda step: rows)
        torch.testing.assert_close(boost, steered(model, bias, **inputs), atol=1e-5, rtol=1e-5)


def test_the_mass_on_the_set_rises_with_alpha():
    model, inputs = build("llava"), batch("llava", "bwPwww")
    found = informed_tokens(model, inputs, local_ratio=0.5, summary_layer=-1)
    masses = []
    for alpha in (0.0, 0.2, 0.5, 1.0):
        with steer(model, paint(local=alpha, summary=alpha, layers=slice(0, 1))):
            weights = attention_maps(model, inputs, heads="0.*")
        masses.append((weights[:, :, -1] * (found.local | found.summary)[:, None]).sum(-1))
    assert (torch.stack(masses).diff(dim=0) >= 0).all()


def test_it_composes_with_other_edits_and_with_rows():
    model, inputs = build("llava"), batch("llava", "bwPwwww")
    scale = ScaleHeads(scale=0.5, heads="1.2")
    for edit in (paint(), paint(mode="bias")):
        both = steered(model, edit, scale, **inputs)
        with steer(model, edit):
            torch.testing.assert_close(steered(model, scale, **inputs), both, atol=1e-6, rtol=1e-6)
        rows = EditRows(lambda weights, rows: weights)
        torch.testing.assert_close(
            steered(model, edit, rows, **inputs), steered(model, edit, **inputs), atol=1e-5, rtol=1e-5
        )


def test_only_the_last_row_pays():
    from headwise.attend import machine

    model, inputs = build("llava"), batch("llava", "bwwwPwww", "bwPw")
    seen = []
    before = machine.softmax_and_sink

    def softmax_and_sink(call: Any, scores: Any) -> Any:
        seen.append(scores.shape[2])
        return before(call, scores)

    machine.softmax_and_sink = softmax_and_sink
    try:
        steered(model, paint(), **inputs)
    finally:
        machine.softmax_and_sink = before
    assert seen == [1, 1]


def test_state_lives_in_the_context():
    edit = paint()
    one, two = build("llava"), build("llava", 1)
    first, second = batch("llava", "bwPwww"), batch("llava", "bPwwwww", seed=9)
    alone = [steered(model, paint(), **inputs) for model, inputs in ((one, first), (two, second), (one, second))]
    with steer(one, edit), steer(two, edit):
        assert torch.equal(logits(one, **first), alone[0])
        assert torch.equal(logits(two, **second), alone[1])
        assert torch.equal(logits(one, **second), alone[2])


# Decoding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mode", ["abs", "bias"])
def test_generation_edits_the_end_of_the_prompt_and_what_is_written(name, beams, mode):
    model, prompts = build(name), ("bwPwww", "bPw", "bwPwPww")
    twin, inputs = copy.deepcopy(model), batch(name, *prompts)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "suppress_tokens": [IMAGE]}
    edit = paint(mode=mode)
    with steer(model, edit):
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
            sets = expected_tokens(name, twin, whole, edit)
            rows = (torch.arange(alone.shape[1]) >= n - 1)[None]
            expected = written_out(twin, whole, rule_of(whole, edit, sets, rows))
            found = torch.stack(scores, 1)
            shown = torch.isfinite(found)
            torch.testing.assert_close(found[shown], expected[:, n - 1 : -1][shown], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [6, 8])
def test_a_prompt_in_chunks_edits_the_end_of_each(cut):
    model, inputs = build("llava"), batch("llava", "bwPwwww", "bwPwwww")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    edit = paint()
    with torch.no_grad(), steer(model, edit):
        out = model(input_ids=ids[:, :cut], pixel_values=pixels, use_cache=True)
        second = model(input_ids=ids[:, cut:], **with_cache(model, cache_of(out)))
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, [cut - 1, -1]] = True
    sets = expected_tokens("llava", model, inputs, edit)
    expected = written_out(model, inputs, rule_of(inputs, edit, sets, rows))
    torch.testing.assert_close(torch.cat([out.logits, second.logits], 1), expected, atol=1e-5, rtol=1e-5)


def test_generated_tokens_alone():
    model, inputs = build("llava"), batch("llava", "bwPwww")
    plain = logits(model, **inputs)
    with torch.no_grad(), steer(model, paint(when="generated")):
        out = model(**inputs, use_cache=True)
        assert torch.equal(out.logits, plain)
        step = model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache_of(out))).logits
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        unedited = model(input_ids=inputs["input_ids"][:, -1:], **with_cache(model, cache)).logits
    assert (step - unedited).abs().max() > 1e-3


def test_guidance_contrasts_with_the_prompt_without_its_picture():
    """Two caches in turn: neither loses what the edit knows of it."""
    model, inputs = build("llava"), batch("llava", "bwPwww", "bPwwww", seed=3)
    with steer(model, paint()):
        options = image_guidance(model, inputs, 1.5)
        made = model.generate(
            **inputs, **options, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    twin = without(inputs, image_positions(model, inputs), model=model)
    ids, blind = inputs["input_ids"], twin["input_ids"]
    new = made.sequences[:, ids.shape[1] :]
    with torch.no_grad(), steer(model, paint()):
        out = model(**inputs, use_cache=True)
        seen = [out.logits[:, -1]]
        for t in range(3):
            out = model(input_ids=new[:, t : t + 1], **with_cache(model, cache_of(out)))
            seen.append(out.logits[:, -1])
    with torch.no_grad():
        unseen = [model(input_ids=torch.cat([blind, new[:, :t]], 1)).logits[:, -1] for t in range(4)]
    for found, with_, without_ in zip(made.scores, seen, unseen, strict=True):
        there, gone = with_.log_softmax(-1), without_.log_softmax(-1)
        torch.testing.assert_close(found, 1.5 * (there - gone) + gone, atol=2e-5, rtol=1e-4)


# Factors of heads


def test_factors_of_heads_come_from_their_attention_on_the_image():
    model, inputs = build("llava"), batch("llava", "bwPwww", "bPww")
    mass = group_mass(model, inputs, {"image": image_tokens()})["image"]
    maps = attention_maps(model, inputs)  # b (l h) t s
    expected = (maps[:, :, -1] * (inputs["input_ids"] == IMAGE)[:, None]).sum(-1).view(2, 2, 4)
    torch.testing.assert_close(mass, expected, atol=1e-6, rtol=1e-5)
    scale = sensitivity_scale(mass)
    mean = expected.mean(0)
    for layer in range(2):
        low, high = mean[layer].min(), mean[layer].max()
        torch.testing.assert_close(scale[layer], (mean[layer] - low) / (high - low))
    torch.testing.assert_close(sensitivity_scale(mass, prefer="insensitive"), 1 - scale)
    assert torch.equal(sensitivity_scale(torch.full((2, 1, 3), 0.4)), torch.ones(1, 3))


# Names, files, refusals


def test_it_has_a_name_on_the_command_line_and_in_files(tmp_path):
    edit = make_edit("imbalanced-attention:local=0.9,mode=bias,layers=1:,local_group=spans:2-3,queries=text", {})
    assert isinstance(edit, ImbalancedAttention)
    assert (edit.local, edit.mode, edit.layers, edit.local_group) == (0.9, "bias", slice(1, None), spans([(2, 4)]))
    assert make_edit("image-token-boost:alpha=0.2", {}) == ImageTokenBoost(0.2)
    with pytest.raises(InputError, match=r"local is -1.0; it must be 0 or more"):
        make_edit("imbalanced-attention:local=-1", {})
    path = str(tmp_path / "edits.json")
    scaled = paint(head_scale=torch.tensor([[0.5, 1.0]]))
    save_edits([edit, ImageTokenBoost(0.2), scaled], path)
    known: Any = {"ImbalancedAttention": ImbalancedAttention, "ImageTokenBoost": ImageTokenBoost}
    again: Any = load_edits(path, known)
    assert again[:2] == [edit, ImageTokenBoost(0.2)]
    assert torch.equal(again[2].head_scale, torch.tensor([[0.5, 1.0]])) and again[2].layers == scaled.layers


def test_a_text_model_takes_groups_of_words():
    model, ids = tiny_llama(), text(2, 11)
    found = steered(model, ImbalancedAttention.example(), input_ids=ids)
    assert (found - logits(model, input_ids=ids))[:, 6:].abs().max() > 1e-3
    assert torch.equal(found[:, :6], logits(model, input_ids=ids)[:, :6])


def test_what_is_refused():
    for make in (lambda: paint(local=-0.1), lambda: paint(summary=math.nan), lambda: ImageTokenBoost(-1.0)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            make()
    with pytest.raises(ValueError, match=r"local_ratio is 1.2; it must lie in 0\.\.1"):
        paint(local_ratio=1.2)
    with pytest.raises(ValueError, match="there are 3 tokens; quartiles need at least 4"):
        outlier_tokens(torch.rand(3))
    with pytest.raises(ValueError, match="head_scale of shape"):
        paint(head_scale=torch.ones(4))
    with pytest.raises(ValueError, match=r"alpha is -1.0 and beta 0.3"):
        boost_scores(torch.zeros(1, 1, 1, 2), *torch.zeros(2, 1, 2).bool().unbind(0), alpha=-1.0)
    model, inputs = build("llava"), batch("llava", "bwPwww")
    with pytest.raises(ValueError, match=r"layers is slice\(2, None, None\), which leaves none"):
        steered(model, ImbalancedAttention(summary_layer=-1))
    with pytest.raises(ValueError, match="layer 3 is out of range; the vision tower has 2 layers"):
        steered(model, paint(local_layer=3))
    with pytest.raises(ValueError, match=r"head_scale is \[2, 3\], the model has \[2, 4\]"):
        steered(model, paint(head_scale=torch.ones(2, 3)))
    with pytest.raises(ValueError, match=r"rule is 'cls', but the vision tower of Qwen2VL.* has no CLS token"):
        steered(build("qwen2_vl"), paint(rule="cls"))
    with pytest.raises(UnsupportedModel, match="attends in windows and reorders its tokens"):
        steered(build("qwen2_5_vl"), paint())
    with pytest.raises(UnsupportedModel, match="names no image token"):
        steered(tiny_llama(), paint())
    with pytest.raises(ValueError, match="informed_tokens: local_ratio is -1"):
        informed_tokens(model, inputs, local_ratio=-1.0)
    with pytest.raises(ValueError, match=r"scale is 0.5; it must be 1 or more"):
        image_guidance(model, inputs, 0.5)
    with pytest.raises(UnsupportedModel, match="keeps the positions of its last prompt"):
        image_guidance(build("qwen2_vl"), batch("qwen2_vl", "bPw"))
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE] = torch.cat(list(features))
    with steer(model, paint()), pytest.raises(ValueError, match="the vision tower did not run since"):
        logits(model, input_ids=inputs["input_ids"])
    assert torch.isfinite(embeds).all()
