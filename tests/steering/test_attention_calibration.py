"""ACT: the equation, the official code, the models it runs in, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.attend.defined_edits import first_real, place, plain_weights, visible
from tests.attend.materialised import repeat
from tests.attend.test_edits_reference import KINDS, calls
from tests.contracts.models_under_test import HEADS, LAYERS, left_padded, text, tiny_llama
from tests.steering.calibrated import LOOSE, act, by_definition, logits
from torch import Tensor

from headwise._edits import make_edit
from headwise.attend.addresses import Head
from headwise.attend.call import Call
from headwise.attend.edits import BiasGroup, EditRows
from headwise.attend.groups import first_token
from headwise.attend.machine import BoundEdit, attend
from headwise.attend.probes import make_probe
from headwise.attend.received import mean_received
from headwise.attend.saving import load_edits, save_edits
from headwise.errors import InputError
from headwise.hf.maps import attention_maps
from headwise.hf.session import probe, steer
from headwise.steering import attention_calibration
from headwise.steering.attention_calibration import AttentionCalibration, calibrate_sinks, calibration_bias

FIXTURE = Path(__file__).parents[1] / "fixtures" / "attention_calibration.safetensors"


def maps(seed: int = 0, strength: float = 2.0, n: int = 9) -> Tensor:
    scores = strength * torch.randn(2, 3, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def drawn_sinks(seed: int = 0, n: int = 9) -> Tensor:
    """A few keys of every head, never the first."""
    sinks = torch.rand(2, 3, 1, n, generator=torch.Generator().manual_seed(seed)) < 0.3
    sinks[..., 0] = False
    return sinks


# The equation


@given(st.integers(0, 50), st.floats(0, 1), st.floats(0.1, 8))
def test_the_equation_of_the_paper(seed, beta, strength):
    a, sinks = maps(seed, strength), drawn_sinks(seed)
    found = calibrate_sinks(a, sinks, beta)
    on, off = (a * sinks).sum(-1, keepdim=True), (a * ~sinks).sum(-1, keepdim=True)
    expected = torch.where(sinks, beta * a, a + (1 - beta) * on * a / off)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert (found.triu(1) == 0).all() and torch.equal(found[..., 0, 0], a[..., 0, 0])


def test_beta_one_and_no_sinks_return_the_weights():
    a = maps().float()
    assert torch.equal(calibrate_sinks(a, drawn_sinks(), 1.0), a)
    assert torch.equal(calibrate_sinks(a, torch.zeros(9, dtype=torch.bool), 0.3), a)
    assert not torch.equal(calibrate_sinks(a, drawn_sinks(), 0.3), a)


def test_permuting_the_other_columns_commutes():
    a, sinks = maps(), torch.zeros(9, dtype=torch.bool)
    sinks[[3, 5]] = True
    order = torch.tensor([4, 1, 8, 3, 0, 5, 2, 7, 6])  # 3 and 5 stay
    torch.testing.assert_close(calibrate_sinks(a, sinks)[..., order], calibrate_sinks(a[..., order], sinks))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.4, 1.0])
def test_it_is_a_bias_on_the_scores(beta):
    """Fused attention with the bias is attention with the changed weights."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 12, 8)
    hidden = torch.ones(12, 12).triu(1).bool()
    weights = (q @ k.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    sinks = (mean_received(weights) > LOOSE)[:, :, None] & (torch.arange(12) > 0)
    bias = calibration_bias(weights, sinks, beta).masked_fill(hidden, -torch.inf)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(found, calibrate_sinks(weights, sinks, beta) @ v, atol=1e-5, rtol=1e-5)
    assert sinks.any() and bool((calibration_bias(weights, sinks, beta)[sinks.expand_as(weights)] <= 0).all())


def test_exact_where_sinks_take_nearly_all():
    weights = torch.tensor([1e-7, 1 - 3e-7, 2e-7])
    sinks = torch.tensor([False, True, False])
    found, exact = calibrate_sinks(weights, sinks, 0.4), calibrate_sinks(weights.double(), sinks, 0.4)
    torch.testing.assert_close(found, exact.float(), atol=0, rtol=1e-6)
    assert found.tolist() == pytest.approx([0.2, 0.4, 0.4], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_a_row_with_weight_on_sinks_alone_stays_as_it_is(beta):
    """The authors' code divides 0 by 0."""
    rows = torch.tensor([[0.0, 0.3, 0.7], [0.0, 0.0, 0.0]])
    sinks = torch.tensor([False, True, True])
    assert torch.equal(calibrate_sinks(rows, sinks, beta), rows)
    assert torch.equal(calibration_bias(rows, sinks, beta), torch.zeros(2, 3))


def test_half_precision_is_changed_in_single():
    a = maps().float()
    found = calibrate_sinks(a.bfloat16(), drawn_sinks())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), calibrate_sinks(a, drawn_sinks()), atol=4e-3, rtol=2e-2)


def test_against_the_official_code():
    """Random causal maps of 48 tokens in which the first is a sink: the official prefill, head for head."""
    fixture = load_file(FIXTURE)
    a = fixture["maps"]
    sinks = mean_received(a) > 0.1
    assert sinks[..., 0].all() and sinks[..., 1:].any()
    sinks[..., 0] = False
    found = calibrate_sinks(a, sinks[:, :, None], 0.4)
    torch.testing.assert_close(found, fixture["calibrated"], atol=1e-6, rtol=1e-6)
    # With a cache it puts a weight of 1 on key 0 of the new row, on top of the others: not followed.
    assert (fixture["one_row"].sum(-1) > 1.2).all()


# One call, by every path, against weights written out in float64


@settings(max_examples=150, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_a_call_is_the_definition(data):
    draw = data.draw
    call = calls(draw, kinds=KINDS)
    h = call.q.shape[1]
    statistics = draw(st.sampled_from(["prompt", "running"]))
    relative = draw(st.booleans())
    threshold = draw(st.sampled_from([1.3, 2.1, 4.0] if relative else [0.07, 0.15, 0.4]))
    heads = draw(st.lists(st.integers(0, h - 1), min_size=1, unique=True))
    edit = AttentionCalibration(
        beta=draw(st.sampled_from([0.0, 0.4, 0.9])), threshold=threshold, relative=relative, statistics=statistics
    )
    weights = plain_weights(call, call.q.double(), call.k.double())
    s = call.k.shape[2]
    seen, (rows, columns) = visible(call).expand(-1, h, -1, -1), place(call)
    real = call.step.real
    expected, close = weights.clone(), False
    for b in range(len(weights)):
        for j in heads:
            for q in range(weights.shape[2]):
                until = q + 1 if statistics == "running" else weights.shape[2]
                known = [r for r in range(until) if real[b, rows[r]]]
                position = int(rows[until - 1])
                tokens = real[b].sum() if call.kind != "causal" else real[b, : position + 1].sum()
                bound = threshold / max(1, int(tokens)) if relative else threshold
                sinks = []
                for k in range(s):
                    count = sum(bool(seen[b, j, r, k]) for r in known)
                    mean = float(sum(weights[b, j, r, k] for r in known)) / max(1, count)
                    close |= abs(mean - bound) < 1e-5
                    if mean > bound and real[b, columns[k]] and columns[k] != first_real(call)[b]:
                        sinks.append(k)
                others = [k for k in range(weights.shape[3]) if k not in sinks]
                rest, freed = weights[b, j, q, others].sum(), (1 - edit.beta) * weights[b, j, q, sinks].sum()
                if rest > 0:
                    expected[b, j, q, sinks] *= edit.beta
                    expected[b, j, q, others] *= 1 + freed / rest
    if close:  # single precision may be on the other side
        return
    out = expected[..., :s] @ repeat(call.v.double(), h)
    small = draw(st.booleans())
    size = attention_calibration.ROWS_PER_BLOCK
    try:
        attention_calibration.ROWS_PER_BLOCK = 3 if small else size  # the paths of long prompts
        found = attend(call, [BoundEdit(edit, {("", 0): heads})])
    finally:
        attention_calibration.ROWS_PER_BLOCK = size
    kept = seen.any(-1).transpose(1, 2)
    torch.testing.assert_close(found.double()[kept], out.transpose(1, 2)[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("statistics", ["prompt", "running"])
@pytest.mark.parametrize("grouped", [1, 2])
def test_a_long_prompt_in_single_precision(statistics, grouped):
    """300 rows by the fused paths against float64, with sinks of many strengths."""
    torch.manual_seed(0)
    h, t, d = 4, 300, 16
    q, k, v = torch.randn(1, h, t, d), torch.randn(1, h // grouped, t, d), torch.randn(1, h // grouped, t, d)
    q[..., -1] = 1
    k[..., ::37, -1] = torch.tensor([14.0, 20.0, 22.0, 16.0, 24.0, 12.0, 21.0, 18.0, 15.0])
    call = Call(q, k, v, causal=True, scale=0.25)
    edit = AttentionCalibration(threshold=0.02, statistics=statistics)
    found = attend(call, [BoundEdit(edit, {("", 0): [0, 2, 3]})])
    weights = plain_weights(call, q.double(), k.double())
    expected = weights.clone()
    if statistics == "prompt":
        sinks = (mean_received(weights) > 0.02)[:, :, None].expand_as(weights)
    else:
        counts = torch.ones(t, t, dtype=torch.float64).tril().cumsum(0)
        sinks = weights.cumsum(2) / counts.clamp_min(1) > 0.02
    sinks = sinks & (torch.arange(t) > 0)
    assert 3 < sinks[0, 0].sum(-1)[-1] < 60
    expected[:, [0, 2, 3]] = calibrate_sinks(weights, sinks)[:, [0, 2, 3]]
    out = (expected @ repeat(v.double(), h)).transpose(1, 2)
    torch.testing.assert_close(found.double(), out, atol=1e-5, rtol=1e-4)


# In a model


@pytest.fixture
def model():
    return tiny_llama()


@pytest.mark.parametrize("statistics", ["prompt", "running"])
@pytest.mark.parametrize("long", [False, True])
def test_a_model_under_the_edit_is_the_model_with_changed_weights(statistics, long, model, monkeypatch):
    if long:
        monkeypatch.setattr(attention_calibration, "ROWS_PER_BLOCK", 4)
    ids = text(2, 14)
    last = [14] * 14 if statistics == "prompt" else list(range(1, 15))
    found = logits(model, act(statistics), input_ids=ids)
    torch.testing.assert_close(found, logits(model, by_definition(last), input_ids=ids), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(model, input_ids=ids), atol=0.1)


@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_beta_one_is_the_plain_model_bit_for_bit(statistics, model):
    for batch in ({"input_ids": text()}, left_padded([text(1, 9)[0], text(1, 5)[0]])):
        plain = logits(model, **batch)
        assert torch.equal(logits(model, act(statistics, beta=1.0), **batch), plain)
        # Without a key above the threshold nothing is moved either.
        nothing = logits(model, act(statistics, threshold=0.9999), **batch)
        torch.testing.assert_close(nothing, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_left_padding_and_grouped_keys(implementation, statistics, model):
    """A batch of three lengths is three texts: rows and columns of padding count for nothing."""
    lines = [text(1, 12)[0], text(1, 8, seed=1)[0], text(1, 5, seed=2)[0]]
    model.set_attn_implementation(implementation)
    batch = logits(model, act(statistics), **left_padded(lines))
    for row, line in enumerate(lines):
        n = len(line)
        last = [n] * n if statistics == "prompt" else list(range(1, n + 1))
        alone = logits(model, by_definition(last), input_ids=line[None])[0]
        torch.testing.assert_close(batch[row, -n:], alone, atol=2e-5, rtol=1e-4)


def test_right_padding_changes_nothing(model):
    line = text(1, 7)[0]
    ids = torch.stack([text(1, 11, seed=3)[0], torch.nn.functional.pad(line, (0, 4))])
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    found = logits(model, act(), input_ids=ids, attention_mask=mask)[1, :7]
    torch.testing.assert_close(found, logits(model, act(), input_ids=line[None])[0], atol=1e-5, rtol=1e-4)


def test_the_first_token_is_never_damped(model):
    """Nor is another key spared in its place where it is no sink, as in the authors' code."""
    ids = text(1, 10)
    plain = attention_maps(model, ids, "0.*")
    with steer(model, act(threshold=1e-4, beta=0.0, heads="0.*")):
        changed = attention_maps(model, ids, "0.*")
    torch.testing.assert_close(changed[..., 0], torch.ones_like(changed[..., 0]))
    assert plain[..., 0].min() < 0.5
    lowest = float(mean_received(plain)[0, :, 1:].amax(1).min())
    with steer(model, act(threshold=lowest * 0.99, beta=0.0, heads="0.*")):
        damped = attention_maps(model, ids, "0.*")
    assert ((damped[0, :, :, 1:] == 0) & (plain[0, :, :, 1:] > 0)).any(-1).any(-1).all()  # one in every head


def test_a_relative_threshold_follows_the_length(model):
    ids = text(1, 14)
    same = logits(model, act(threshold=2.0, relative=True), input_ids=ids)
    torch.testing.assert_close(same, logits(model, act(threshold=2 / 14), input_ids=ids), atol=1e-6, rtol=1e-6)
    short = logits(model, act(threshold=2.0, relative=True), input_ids=ids[:, :8])
    torch.testing.assert_close(short, logits(model, act(threshold=2 / 8), input_ids=ids[:, :8]), atol=1e-6, rtol=1e-6)
    assert AttentionCalibration(relative=True).limit == 5.0 and AttentionCalibration().limit == 0.1


def test_bfloat16_stays_near_single_precision():
    ids = text(2, 12)
    exact, plain = logits(tiny_llama(), act(), input_ids=ids), logits(tiny_llama(), input_ids=ids)
    half = tiny_llama().bfloat16()
    error = (logits(half, act(), input_ids=ids).float() - exact).norm() / exact.norm()
    own = (logits(half, input_ids=ids).float() - plain).norm() / plain.norm()
    assert error <= 4 * own + 1e-3


@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_other_edits_come_first_or_last(statistics, model):
    """After a bias the columns are those that the bias left; before it they are the model's own."""
    ids, last = text(2, 10), [10] * 10 if statistics == "prompt" else list(range(1, 11))
    bias = BiasGroup(first_token(), math.log(0.3), heads=["0.0", "0.1"])
    for order in ((bias, act(statistics)), (act(statistics), bias)):
        formed = [by_definition(last) if isinstance(edit, AttentionCalibration) else edit for edit in order]
        expected = logits(model, *formed, input_ids=ids)
        torch.testing.assert_close(logits(model, *order, input_ids=ids), expected, atol=2e-5, rtol=1e-4)
    twice = logits(model, act(statistics), act(statistics, beta=0.7, threshold=0.2), input_ids=ids)
    formed = (by_definition(last), by_definition(last, beta=0.7, threshold=0.2))
    torch.testing.assert_close(twice, logits(model, *formed, input_ids=ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("statistics", ["prompt", "running"])
def test_probes_read_what_the_edit_left(statistics, model):
    ids, last = text(2, 12), [12] * 12 if statistics == "prompt" else list(range(1, 13))
    scores = []
    for edit in (act(statistics), by_definition(last)):
        with steer(model, edit), probe(model, *(read := [make_probe(name) for name in ("sink", "entropy", "sinks")])):
            logits(model, input_ids=ids)
        scores.append(torch.cat([table for one in read for table in one.scores().values()]))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-6, rtol=1e-5)


def test_a_learned_sink_column_gets_its_part():
    """Its share grows like that of every other key; the rows of keys sum to the rest."""
    torch.manual_seed(0)
    q = torch.randn(1, 2, 6, 4)
    call = Call(q, torch.randn(1, 2, 6, 4), torch.eye(6)[None, None].expand(1, 2, 6, 6), causal=True, scale=0.5)
    call.sinks = torch.tensor([0.3, 1.0])
    weights = plain_weights(call, q.double(), call.k.double())
    sinks = (mean_received(weights[..., :6]) > 0.15)[:, :, None] & (torch.arange(6) > 0)
    wide = calibrate_sinks(weights, torch.nn.functional.pad(sinks, (0, 1)))
    found = attend(call, [BoundEdit(AttentionCalibration(threshold=0.15), {("", 0): [0, 1]})])
    torch.testing.assert_close(found.transpose(1, 2).double(), wide[..., :6], atol=1e-6, rtol=1e-5)
    assert (wide[..., 6] > weights[..., 6] - 1e-12).all() and (wide[..., 6] > weights[..., 6] + 1e-3).any()


def test_models_that_are_not_causal_count_all_rows():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert: Any = BertModel(BertConfig(vocab_size=40, initializer_range=0.3, **sizes)).eval()
    ids = text(1, 9)
    plain = attention_maps(bert, ids)
    sinks = (mean_received(plain, causal=False) > LOOSE)[:, :, None] & (torch.arange(9) > 0)
    with steer(bert, act(heads="all")):
        found = attention_maps(bert, ids)
    torch.testing.assert_close(found, calibrate_sinks(plain, sinks, 0.2), atol=1e-6, rtol=1e-5)
    assert sinks.any()


@pytest.mark.parametrize("long", [False, True])
def test_gradients_are_those_of_the_changed_weights(long, model, monkeypatch):
    """The choice of sinks has no gradient, what is done with them has."""
    if long:
        monkeypatch.setattr(attention_calibration, "ROWS_PER_BLOCK", 4)
    ids = text(1, 9)
    plain = attention_maps(model, ids, "0.1")
    sinks = (mean_received(plain) > LOOSE)[:, :, None] & (torch.arange(9) > 0)
    formed = EditRows(lambda weights, rows: calibrate_sinks(weights, sinks, 0.2), heads=["0.1"])
    grads = []
    for edit in (act(heads=["0.1"]), formed):
        model.zero_grad()
        with steer(model, edit):
            model(input_ids=ids).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    assert grads[0].abs().max() > 0


# By name


def test_it_is_made_from_text_and_saved(tmp_path: Path):
    made = make_edit("attention-calibration:beta=0.2,relative=yes,threshold=4,statistics=running,heads=1.2", {})
    assert isinstance(made, AttentionCalibration)
    assert (made.beta, made.limit, made.statistics, made.heads) == (0.2, 4.0, "running", "1.2")
    save_edits([made, act()], str(tmp_path / "edits.json"))
    read = load_edits(str(tmp_path / "edits.json"), {"AttentionCalibration": AttentionCalibration})
    assert read == [made, act()]
    with pytest.raises(InputError, match=r"beta is 3.0; it must lie between 0"):
        make_edit("attention-calibration:beta=3", {})


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, r"AttentionCalibration: beta is -0.1; it must lie between 0 .* and 1"),
        ({"beta": 1.5}, r"beta is 1.5"),
        ({"beta": math.nan}, r"beta is nan"),
        ({"threshold": 0.0}, r"threshold is 0.0; a mean weight lies between 0 and 1"),
        ({"threshold": 1.0}, r"threshold is 1.0"),
        ({"threshold": -2.0, "relative": True}, r"threshold is -2.0; it must be above 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionCalibration(**options)


def test_unknown_statistics_are_refused():
    edit: Any = AttentionCalibration()
    edit.statistics = "whole"  # in the constructor the type checks of the tests come first
    with pytest.raises(ValueError, match=r"statistics is 'whole'; choose prompt or running"):
        edit.__post_init__()


def test_heads_out_of_range(model):
    with pytest.raises(ValueError, match=rf"layer {LAYERS} is out of range"), steer(model, act(heads=f"{LAYERS}.0")):
        pass
    with pytest.raises(ValueError, match=rf"head 0.{HEADS}"), steer(model, act(heads=[Head(0, HEADS)])):
        pass


@pytest.mark.parametrize("function", [calibrate_sinks, calibration_bias])
def test_pure_functions_refuse_beta_out_of_range(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: beta is 2.0"):
        function(torch.ones(1, 2) / 2, torch.tensor([False, True]), 2.0)
