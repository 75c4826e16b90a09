"""ZeroTuning: the identities of its equation, the models it runs in, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contracts.models_under_test import HEADS, LAYERS, left_padded, text, tiny_llama
from torch import Tensor

from headwise.attend.addresses import Head
from headwise.attend.edits import BiasGroup, EditRows
from headwise.attend.groups import first_token
from headwise.hf.inputs import cache_of, with_cache
from headwise.hf.maps import attention_maps
from headwise.hf.session import steer
from headwise.steering.zero_tuning import (
    ZeroTuning,
    initial_token_bias,
    scale_initial_token,
    sweep_initial_token,
    token_leverage,
)

GAMMAS = (0.0, 1e-6, 0.3, 1.0, 1.6, 4.0, 1e6)


def rows(seed: int = 0, strength: float = 3.0) -> Tensor:
    """`[2 h t s]` causal weights, from flat rows to rows that are nearly one-hot."""
    generator = torch.Generator().manual_seed(seed)
    scores = strength * torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    return scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)


def entropy(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


def logits(model: Any, *edits: Any, **inputs: Any) -> Tensor:
    with torch.no_grad(), steer(model, *edits):
        return model(**inputs).logits


# The equation


@pytest.mark.parametrize("gamma", GAMMAS)
def test_scaling_and_renormalising_is_a_bias_of_log_gamma(gamma):
    generator = torch.Generator().manual_seed(1)
    scores = 4 * torch.randn(5, 12, generator=generator)
    biased = scores.clone()
    biased[:, 0] += torch.tensor(initial_token_bias(gamma))
    found = scale_initial_token(scores.softmax(-1), gamma)
    torch.testing.assert_close(found, biased.softmax(-1), atol=1e-6, rtol=1e-5)


@given(st.integers(0, 50), st.floats(0.01, 100), st.floats(0.1, 8))
def test_the_equation_of_the_paper(seed, gamma, strength):
    a = rows(seed, strength)
    found = scale_initial_token(a, gamma)
    d = 1 + (gamma - 1) * a[..., 0]
    torch.testing.assert_close(found[..., 0], gamma * a[..., 0] / d, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found[..., 1:], a[..., 1:] / d[..., None], atol=1e-12, rtol=1e-9)
    # Differences of later weights change by (1 - gamma) a_0 / D of themselves.
    before, after = a[..., 2:] - a[..., 1:-1], found[..., 2:] - found[..., 1:-1]
    change = ((1 - gamma) * a[..., 0] / d)[..., None] * before
    torch.testing.assert_close(after - before, change, atol=1e-12, rtol=1e-7)


@given(st.integers(0, 50), st.floats(0.01, 100))
def test_the_entropy_of_a_row_follows_from_its_first_weight(seed, gamma):
    a = rows(seed)[..., 1:, :]
    found = scale_initial_token(a, gamma)
    tails = [w[..., 1:] / w[..., 1:].sum(-1, keepdim=True) for w in (a, found)]
    torch.testing.assert_close(entropy(tails[0]), entropy(tails[1]), atol=1e-9, rtol=1e-7)
    first = found[..., :1]
    expected = entropy(torch.cat([first, 1 - first], -1)) + (1 - first[..., 0]) * entropy(tails[0])
    torch.testing.assert_close(entropy(found), expected, atol=1e-9, rtol=1e-7)


@given(st.floats(0.05, 20), st.floats(0.05, 20))
def test_two_factors_are_their_product(one, other):
    a = rows(3)
    twice = scale_initial_token(scale_initial_token(a, one), other)
    torch.testing.assert_close(twice, scale_initial_token(a, one * other), atol=1e-12, rtol=1e-9)


def test_gamma_one_returns_the_weights():
    a = rows().float()
    assert torch.equal(scale_initial_token(a, 1.0), a)
    mixed = scale_initial_token(a, torch.tensor([1.0, 2.0, 1.0])[:, None])
    assert torch.equal(mixed[:, [0, 2]], a[:, [0, 2]]) and not torch.equal(mixed[:, 1], a[:, 1])


def test_limits():
    a = rows().float()
    nothing = scale_initial_token(a, 0.0)
    assert (nothing[..., 1:, 0] == 0).all() and torch.allclose(nothing.sum(-1), torch.ones(()))
    torch.testing.assert_close(nothing, scale_initial_token(a, 1e-9), atol=1e-6, rtol=1e-5)
    everything = scale_initial_token(a, math.inf)
    assert torch.equal(everything, torch.nn.functional.one_hot(torch.zeros(2, 3, 9).long(), 9).float())


@pytest.mark.parametrize("gamma", [0.0, 0.3, 7.0, math.inf])
def test_a_row_that_sees_one_key_stays_as_it_is(gamma):
    """The authors' code divides 0 by 0 at gamma 0."""
    row = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    assert torch.equal(scale_initial_token(row, gamma), row)
    if gamma == math.inf:
        unseen = torch.tensor([0.0, 0.4, 0.6])
        assert torch.equal(scale_initial_token(unseen, gamma), unseen)


def test_the_first_token_may_be_another_column_in_every_row():
    a = rows().float()
    index = torch.tensor([0, 2])[:, None, None]
    found = scale_initial_token(a, 3.0, index)
    assert torch.equal(found[0], scale_initial_token(a[0], 3.0))
    assert torch.equal(found[1], scale_initial_token(a[1], 3.0, index=2))


def test_half_precision_is_scaled_in_single():
    a = rows().float()
    torch.testing.assert_close(
        scale_initial_token(a.bfloat16(), 1.7).float(), scale_initial_token(a, 1.7), atol=4e-3, rtol=2e-2
    )
    assert scale_initial_token(a.bfloat16(), 1.7).dtype == torch.bfloat16


# In a model


@pytest.fixture
def model():
    return tiny_llama()


def materialised(gamma: Any, index: Any = 0) -> EditRows:
    return EditRows(lambda weights, at: scale_initial_token(weights, gamma, index))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.6, 4.0, 1e6])
def test_a_model_under_the_edit_is_the_model_with_scaled_weights(gamma, model):
    ids = text(2, 14)
    found = logits(model, ZeroTuning(gamma=gamma), input_ids=ids)
    torch.testing.assert_close(found, logits(model, materialised(gamma), input_ids=ids), atol=1e-5, rtol=1e-5)


def eager_reference(model: Any, inputs: dict[str, Tensor], gamma: float) -> Tensor:
    """Logits with log gamma added to the first real column of the additive mask of plain eager attention."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    t = ids.shape[1]
    seen = torch.ones(t, t).tril().bool() & real[:, None, None]
    seen = seen | torch.eye(t).bool()  # padding rows must see something
    mask = torch.zeros(len(ids), 1, t, t).masked_fill(~seen, torch.finfo(torch.float32).min)
    for row, first in enumerate(real.int().argmax(-1).tolist()):
        mask[row, :, first + 1 :, first] += math.log(gamma)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**{**inputs, "attention_mask": mask}).logits
    model.set_attn_implementation(implementation)
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_grouped_keys_and_left_padding_against_eager_attention(implementation, model):
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    batch = left_padded([text(1, 12)[0], text(1, 7, seed=1)[0], text(1, 3, seed=2)[0]])
    model.set_attn_implementation(implementation)
    found = logits(model, ZeroTuning(gamma=3.0), **batch)
    expected = eager_reference(model, batch, 3.0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing(model):
    ids = text(1, 9)
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    found = logits(model, ZeroTuning(gamma=3.0), input_ids=padded, attention_mask=mask)[:, :9]
    torch.testing.assert_close(found, logits(model, ZeroTuning(gamma=3.0), input_ids=ids), atol=1e-5, rtol=1e-5)


def test_gamma_one_is_the_plain_model_bit_for_bit(model):
    ids = text()
    before = model(input_ids=ids).logits
    ones: list[Any] = [1.0, torch.ones(LAYERS, HEADS), {Head(0, 1): 1.0}]
    for gamma in ones:
        assert ZeroTuning(gamma=gamma).neutral
        assert torch.equal(logits(model, ZeroTuning(gamma=gamma), input_ids=ids), before)


@pytest.mark.parametrize("when", ["all", "prompt"])
def test_gamma_zero_hides_the_first_key_from_later_queries_only(when, model):
    ids = text(2, 10)
    plain = attention_maps(model, ids)
    with steer(model, ZeroTuning(gamma=0.0, heads="0.*", when=when)):
        maps = attention_maps(model, ids, heads="0.*")
    assert (maps[:, :, 1:, 0] == 0).all()
    assert torch.equal(maps[:, :, 0], plain[:, :HEADS, 0])  # the first query keeps its only key
    mask = torch.ones(10, 10).tril().bool()
    mask[1:, 0] = False
    model.set_attn_implementation("eager")
    hidden = torch.zeros(2, 1, 10, 10).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=hidden, output_attentions=True).attentions[0]
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gamma", [1e12, math.inf])
def test_a_huge_gamma_leaves_the_first_token_alone(gamma, model):
    ids = text(2, 10)
    with steer(model, ZeroTuning(gamma=gamma)):
        maps = attention_maps(model, ids)
    torch.testing.assert_close(maps[..., 0], torch.ones_like(maps[..., 0]), atol=1e-4, rtol=0)


def test_two_edits_in_a_row_are_their_product(model):
    ids = text()
    both = logits(model, ZeroTuning(gamma=2.0), ZeroTuning(gamma=0.75), input_ids=ids)
    torch.testing.assert_close(both, logits(model, ZeroTuning(gamma=1.5), input_ids=ids), atol=1e-5, rtol=1e-5)
    undone = logits(model, ZeroTuning(gamma=4.0), ZeroTuning(gamma=0.25), input_ids=ids)
    torch.testing.assert_close(undone, logits(model, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_a_gamma_for_every_head(model):
    """`[l, h]` and a number a head are the same edit, and each head gets its own."""
    ids = text()
    table = torch.linspace(0.2, 3, LAYERS * HEADS).view(LAYERS, HEADS)
    table[1, 2] = 1.0
    by_head = {Head(layer, head): float(table[layer, head]) for layer in range(LAYERS) for head in range(HEADS)}
    found = logits(model, ZeroTuning(gamma=table), input_ids=ids)
    torch.testing.assert_close(found, logits(model, ZeroTuning(gamma=by_head), input_ids=ids), atol=1e-6, rtol=1e-6)
    single = [ZeroTuning(gamma=gamma, heads=[head]) for head, gamma in by_head.items()]
    torch.testing.assert_close(found, logits(model, *single, input_ids=ids), atol=1e-5, rtol=1e-5)
    reference = EditRows(lambda weights, at: scale_initial_token(weights, table[at.call.layer, at.call.heads][:, None]))
    torch.testing.assert_close(found, logits(model, reference, input_ids=ids), atol=1e-5, rtol=1e-5)


def test_the_official_head_number_is_a_selection_of_that_head_in_all_layers(model):
    ids = text()
    found = logits(model, ZeroTuning(gamma=2.5, heads="*.3"), input_ids=ids)
    named = ZeroTuning(gamma=2.5, heads=[Head(layer, 3) for layer in range(LAYERS)])
    assert torch.equal(found, logits(model, named, input_ids=ids))


def test_scaling_the_key_is_another_edit(model):
    """The authors' form for fused kernels multiplies the score of key 0, so its effect depends on the query."""
    ids = text(1, 8)
    plain = attention_maps(model, ids, heads="0.*")

    def rescale(module, args, output):
        output = output.clone()
        output[:, 0] *= 2.5
        return output

    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(rescale)
    scaled = attention_maps(model, ids, heads="0.*")
    handle.remove()
    odds = (scaled[..., 0] / scaled[..., 1] / (plain[..., 0] / plain[..., 1]))[:, :, 2:]
    assert odds.std() > 0.1
    with steer(model, ZeroTuning(gamma=2.5)):
        biased = attention_maps(model, ids, heads="0.*")
    odds = (biased[..., 0] / biased[..., 1] / (plain[..., 0] / plain[..., 1]))[:, :, 2:]
    torch.testing.assert_close(odds, torch.full_like(odds, 2.5), atol=1e-3, rtol=1e-4)


def test_no_bos_means_the_first_word(model):
    ids = text()[:, 1:]
    found = logits(model, ZeroTuning(gamma=3.0), input_ids=ids)
    torch.testing.assert_close(found, logits(model, materialised(3.0), input_ids=ids), atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_near_single_precision():
    ids = text(2, 16)
    model = tiny_llama()
    exact = logits(model, ZeroTuning(gamma=4.0), input_ids=ids)
    plain = logits(model, input_ids=ids)
    half = tiny_llama().bfloat16()
    error = (logits(half, ZeroTuning(gamma=4.0), input_ids=ids).float() - exact).norm() / exact.norm()
    own = (logits(half, input_ids=ids).float() - plain).norm() / plain.norm()
    assert error <= 2 * own + 1e-3


# Decoding


def told(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **{name: value for name, value in batch.items() if name != "position_ids"},
        max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("gamma", [0.2, 5.0])
def test_generation_in_a_padded_batch(cache, gamma, model):
    lines = [text(1, 11)[0], text(1, 6, seed=4)[0]]
    single = [{"input_ids": line[None], "attention_mask": torch.ones_like(line[None])} for line in lines]
    with steer(model, ZeroTuning(gamma=gamma)):
        batch = told(model, left_padded(lines), cache_implementation=None if cache == "dynamic" else cache)
        alone = [told(model, one) for one in single]
        whole = [model(input_ids=one.sequences).logits for one in alone]
    for row, (line, one, full) in enumerate(zip(lines, alone, whole, strict=True)):
        assert torch.equal(batch.sequences[row, 11:], one.sequences[0, len(line) :])
        scores = torch.stack(batch.scores, 1)[row]
        torch.testing.assert_close(scores, full[0, len(line) - 1 : -1], atol=2e-5, rtol=1e-4)


def test_a_prompt_in_chunks(model):
    ids = text(2, 12)
    with torch.no_grad(), steer(model, ZeroTuning(gamma=4.0)):
        full = model(input_ids=ids).logits
        out = model(input_ids=ids[:, :5], use_cache=True)
        pieces = [out.logits]
        for chunk in (ids[:, 5:6], ids[:, 6:12]):
            out = model(input_ids=chunk, **with_cache(model, cache_of(out)))
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5, rtol=1e-5)


def test_generated_rows_only(model):
    """`when="generated"` leaves the prompt as it is and edits what is decoded."""
    ids = text(1, 8)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with steer(model, ZeroTuning(gamma=6.0, when="generated")):
            out = model(input_ids=ids, use_cache=True)
            step = model(input_ids=ids[:, :1], **with_cache(model, cache_of(out))).logits
        cache = cache_of(model(input_ids=ids, use_cache=True))
        unedited = model(input_ids=ids[:, :1], **with_cache(model, cache)).logits
    assert torch.equal(out.logits, plain)
    assert not torch.allclose(step, unedited, atol=1e-3)


# The lever


def test_leverage_is_the_derivative_of_scaling_one_token(model):
    ids = text(2, 9)

    def loss(output: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    found = token_leverage(model, {"input_ids": ids}, loss)
    assert found.shape == (2, LAYERS * HEADS, 9)

    def slope(edit: Any, step: float = 0.02) -> Tensor:
        ends = []
        for sign in (1, -1):
            with torch.no_grad(), steer(model, edit(sign * step)):
                ends.append(loss(model(input_ids=ids)))
        return (ends[0] - ends[1]) / (2 * step)

    for number, head in ((1, "0.1"), (6, "1.2")):
        expected = slope(lambda bias, head=head: ZeroTuning(gamma=math.exp(bias), heads=head))
        torch.testing.assert_close(found[:, number, 0], expected, atol=2e-4, rtol=2e-2)
    from headwise.attend.groups import positions

    expected = slope(lambda bias: BiasGroup(positions([3]), bias, heads="1.2"))
    torch.testing.assert_close(found[:, 6, 3], expected, atol=2e-4, rtol=2e-2)


def test_a_gamma_can_be_learned(model):
    gamma = torch.linspace(0.9, 1.1, LAYERS * HEADS).view(LAYERS, HEADS).requires_grad_()
    ids = text()
    assert not ZeroTuning(gamma=torch.ones(LAYERS, HEADS, requires_grad=True)).neutral
    assert not ZeroTuning(gamma=gamma).neutral
    with steer(model, ZeroTuning(gamma=gamma)):
        model(input_ids=ids).logits.square().mean().backward()
    assert gamma.grad is not None and (gamma.grad != 0).all()


# A sweep over texts


class Letters:
    """A tokenizer of letters, for a model of 40 tokens; BOS in front."""

    bos_token_id, bos_token, is_fast = 1, "<s>", False

    def __init__(self, bos: bool = True):
        self.front = [1] if bos else []

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*self.front, *(ord(letter) - 90 for letter in text)]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(chr(token + 90) for token in ids)


def test_a_sweep_reports_what_cannot_be_read(model):
    prompts = ["abcdef", "bcd", "ghijkl"]
    found = sweep_initial_token(model, Letters(), prompts, ["a", "b", "g"], [0, 1, 2], gammas=(0.3, 1.0, 4.0))
    assert list(found) == [0.3, 1.0, 4.0]
    with steer(model, ZeroTuning(gamma=4.0)):
        again = sweep_initial_token(model, Letters(), prompts, ["a", "b", "g"], [0, 1, 2], gammas=(1.0,))
    assert again[1.0] == found[4.0]
    for answers in found.values():
        assert 0 <= answers.accuracy <= answers.parsable <= 1


def test_a_sweep_warns_of_prompts_without_a_sink(model):
    with pytest.warns(UserWarning, match="2 of 2 prompts do not begin with '<s>', so gamma scales their first word"):
        sweep_initial_token(model, Letters(bos=False), ["abc", "bcd"], ["a"], [0, 0], gammas=(1.0,))


# Refusals


@pytest.mark.parametrize(
    "gamma", [-0.1, math.nan, torch.tensor([[1.0, -2.0]]), {Head(0, 0): 1.0, Head(0, 1): math.nan}]
)
def test_negative_factors_are_refused(gamma):
    for make in (lambda: ZeroTuning(gamma=gamma), lambda: initial_token_bias(gamma)):
        with pytest.raises(ValueError, match=r"gamma is .*; it must be 0 or more"):
            make()


def test_more_refusals(model):
    with pytest.raises(ValueError, match="scale_initial_token: gamma is -1"):
        scale_initial_token(torch.ones(1, 1), -1.0)
    with pytest.raises(ValueError, match=r"index is 3; the rows have 3 keys, so 0 to 2"):
        scale_initial_token(torch.ones(1, 3), 2.0, index=3)
    with pytest.raises(ValueError, match="head 9 is out of range"), steer(model, ZeroTuning(gamma=2.0, heads="0.9")):
        pass
    with pytest.raises(ValueError, match=r"gammas are \[\]"):
        sweep_initial_token(model, Letters(), ["a"], ["a"], [0], gammas=())


def test_the_bias_of_a_model_is_that_of_its_edit(model):
    ids = text()
    bias = BiasGroup(first_token(), math.log(2.5))
    assert torch.equal(logits(model, bias, input_ids=ids), logits(model, ZeroTuning(gamma=2.5), input_ids=ids))
