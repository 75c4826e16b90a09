"""A forward beside another one: it is what the model would have done, and nobody sees it."""

import pytest
import torch
from tests.zoo import FAMILIES, families

from headwise.attend.edits import ScaleHeads
from headwise.attend.probes import HeadOutputs
from headwise.hf.dispatch import is_aside
from headwise.hf.layerwise import Layerwise, position_arguments
from headwise.hf.session import probe, steer
from headwise.hf.sites import find_sites, record

DECODERS = [name for name in (*families(kind="decoder"), *families(kind="multimodal")) if not FAMILIES[name].hybrid]


def text_inputs(name, model):
    inputs = FAMILIES[name].inputs(model, length=20)
    return {"input_ids": inputs["input_ids"].clamp(min=8, max=31)}


@pytest.mark.parametrize("name", DECODERS)
def test_its_heads_are_those_of_a_forward_under_the_same_change(name):
    model = FAMILIES[name].build()
    inputs = text_inputs(name, model)
    implementation = model.config._attn_implementation
    layers = len(FAMILIES[name].towers[""][0])
    seen = {}

    def change(layer):
        def act(out):
            seen[layer] = out
            return out if layer == 0 else 1.5 * out

        return act

    beside = Layerwise(model, inputs)
    for layer in range(layers):
        beside.advance(layer, change(layer))
    assert model.config._attn_implementation == implementation and not is_aside()
    later = ScaleHeads(scale=1.5, heads=f"1-{layers - 1}.*")
    with torch.no_grad(), steer(model, later), probe(model, outputs := HeadOutputs()):
        model(**inputs)
    for layer in range(layers):
        expected = outputs.values["", layer] / (1 if layer == 0 else 1.5)
        torch.testing.assert_close(seen[layer], expected.to(seen[layer]), atol=2e-5, rtol=1e-4)


def test_layers_that_are_passed_over_run_as_they_are_and_none_runs_twice():
    model = FAMILIES["llama"].build()
    inputs = text_inputs("llama", model)
    beside, outs = Layerwise(model, inputs), []
    beside.advance(1, lambda out: outs.append(out) or out)
    with torch.no_grad(), probe(model, outputs := HeadOutputs()):
        model(**inputs)
    torch.testing.assert_close(outs[0], outputs.values["", 1])
    with pytest.raises(RuntimeError, match="layer 1 of the forward beside has run"):
        beside.advance(1)


def test_nothing_that_is_attached_sees_it():
    model = FAMILIES["llava"].build()
    inputs = FAMILIES["llava"].inputs(model, length=20)
    find_sites(model)
    twin = {"input_ids": inputs["input_ids"].clamp(min=8)[:, :7]}

    class Beside(ScaleHeads):
        def change(self, out, call):
            if call.layer == 0:
                Layerwise(model, twin).advance(1)
            return out

    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with record(model, every=True) as alone, probe(model, before := HeadOutputs()):
            model(**inputs)
        with steer(model, Beside(scale=2.0)), record(model, every=True) as seen, probe(model, after := HeadOutputs()):
            out = model(**inputs, output_hidden_states=True)
    assert torch.equal(out.logits, plain.logits) and len(out.hidden_states) == len(plain.hidden_states)
    for site in alone:
        assert [x.shape for x in seen.calls(site)] == [x.shape for x in alone.calls(site)], site
    for place, value in before.values.items():
        torch.testing.assert_close(after.values[place], value)


def test_positions_count_real_tokens_where_the_model_takes_them():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert position_arguments(FAMILIES["gpt2"].build(), mask)["position_ids"].tolist() == [[0, 0, 0, 1]]
    assert position_arguments(FAMILIES["qwen2_vl"].build(), mask) == {}
