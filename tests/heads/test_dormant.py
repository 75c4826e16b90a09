"""Sinks, drains and peaks against materialised attention, and on models whose heads are known."""

import pytest
import torch
from tests.zoo import FAMILIES

from headwise.attend.addresses import Head
from headwise.heads.dormant import activity, extreme_tokens
from headwise.specimens.registry import load_specimen


def eager(family: str, padding=None):
    model = FAMILIES[family].build()
    given = FAMILIES[family].inputs(model, padding=padding)
    model.set_attn_implementation("eager")
    values: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _, __, out: values.__setitem__(name, out)

    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions
    return given, weights, list(values.values())


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("sink", [0, 2])
def test_sink_and_drain_equal_materialised_attention_with_grouped_keys(padding, sink):
    given, weights, values = eager("llama", padding)
    model = FAMILIES["llama"].build()
    found = extreme_tokens(model, given, sink=sink)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    first = real.int().argmax(-1) + sink
    for layer, (a, v) in enumerate(zip(weights, values, strict=True)):
        heads, kv = a.shape[1], 2
        norms = v.view(*v.shape[:2], kv, -1).norm(dim=-1)
        for head in range(heads):
            rows = [a[b, head, t, first[b]] for b in range(len(a)) for t in range(int(first[b]) + 1, a.shape[2])]
            assert found.map.of("sink")[Head(layer, head)] == pytest.approx(float(torch.stack(rows).mean()), abs=1e-5)
            ratios = []
            for b in range(len(a)):
                others = [norms[b, t, head // 2] for t in range(norms.shape[1]) if real[b, t] and t != first[b]]
                ratios.append(norms[b, first[b], head // 2] / torch.stack(others).mean())
            assert found.map.of("drain")[Head(layer, head)] == pytest.approx(
                float(torch.stack(ratios).mean()), abs=1e-5
            )


def test_peak_is_the_ratio_of_residual_norms():
    model = FAMILIES["llama"].build()
    given = FAMILIES["llama"].inputs(model)
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states
    found = extreme_tokens(model, given)
    norms = states[1].norm(dim=-1)
    assert found.peak is not None
    assert found.peak[1] == pytest.approx(float((norms[:, 0] / norms[:, 1:].mean(1)).mean()), rel=1e-5)
    assert len(found.peak) == model.config.num_hidden_layers + 1


def test_planted_sink_head_is_found_and_others_are_not():
    specimen = load_specimen("planted")
    ids = torch.cat([torch.zeros(4, 1, dtype=torch.long), torch.randint(1, 30, (4, 20))], 1)
    sinks = extreme_tokens(specimen.model, ids).map.of("sink")
    assert sinks[Head(1, 1)] == pytest.approx(1.0, abs=1e-3)
    assert all((mass or 0) < 0.6 for head, mass in sinks.items() if head != Head(1, 1))


def test_auto_finds_the_sink_of_a_bidirectional_model_and_says_so():
    model = FAMILIES["bert"].build()
    found = extreme_tokens(model, FAMILIES["bert"].inputs(model), sink="auto")
    masses = [extreme_tokens(model, FAMILIES["bert"].inputs(model), sink=i).map.tensor("sink").mean() for i in range(9)]
    assert found.found == "largest mean weight"
    assert found.sink == int(torch.stack(masses).argmax())


def test_shipped_backcopy_model_has_a_sink_without_value_on_ordinary_rows_only():
    specimen = load_specimen("backcopy")
    from headwise.specimens.backcopy import task

    text = task()
    ids = text.sample(64, torch.Generator().manual_seed(5))
    trigger = text.trigger_mask(ids)
    ordinary = extreme_tokens(specimen.model, ids, rows=~trigger).map
    asked = extreme_tokens(specimen.model, ids, rows=trigger).map
    assert ordinary.of("sink")[Head(0, 0)] >= 0.5  # pyright: ignore[reportOptionalOperand]
    assert asked.of("sink")[Head(0, 0)] <= 0.05  # pyright: ignore[reportOptionalOperand]
    assert ordinary.of("drain")[Head(0, 0)] <= 0.5  # pyright: ignore[reportOptionalOperand]


def test_activity_splits_domains_and_ranks_switching_heads():
    model = FAMILIES["llama"].build()
    one, two = (FAMILIES["llama"].inputs(model, seed=seed) for seed in (0, 1))
    table = activity(model, {"one": [one], "two": [two, two]})
    assert table.sink.shape == (2, 2, 4)
    single = extreme_tokens(model, one).map.tensor("sink").float()
    torch.testing.assert_close(table.sink[0], single, atol=1e-5, rtol=0)
    head = table.switching().top(k=1)[0]
    spread = (table.sink[0] - table.sink[1]).abs()
    assert spread[head.layer, head.head] == spread.max()


@pytest.mark.parametrize(("sink", "message"), [(40, "sink is 40 but the shortest text"), (-1, "sink is -1")])
def test_a_position_outside_the_text_is_refused(sink, message):
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=message):
        extreme_tokens(model, FAMILIES["llama"].inputs(model), sink=sink)


def test_activity_needs_two_domains_with_text():
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="1 domains; give at least two"):
        activity(model, {"one": [FAMILIES["llama"].inputs(model)]})
    with pytest.raises(ValueError, match="domain 'two' has no batches"):
        activity(model, {"one": [FAMILIES["llama"].inputs(model)], "two": []})
