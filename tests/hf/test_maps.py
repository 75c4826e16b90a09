"""Raw maps are the weights that the model attends with; head outputs are what ablation by mean puts in."""

from typing import Any, cast

import pytest
import torch
from tests.zoo import FAMILIES, VOCAB

from headwise.attend.addresses import Head
from headwise.attend.edits import Ablate, ForceRows
from headwise.hf.inputs import as_inputs, context_length, frugal, takes, vocabulary_size
from headwise.hf.maps import attention_maps, head_outputs
from headwise.hf.session import steer

IDS = torch.arange(8, 24).view(1, -1)


def eager(name: str, inputs) -> tuple:
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_maps_are_those_of_eager_attention(name):
    model = FAMILIES[name].build()
    expected = eager(name, {"input_ids": IDS})
    maps = attention_maps(model, IDS, "1.*")
    assert maps.shape == (1, 4, 16, 16)
    torch.testing.assert_close(maps, expected[1], atol=1e-5, rtol=0)
    everything = attention_maps(model, {"input_ids": IDS})
    torch.testing.assert_close(everything, torch.cat(expected, 1), atol=1e-5, rtol=0)


def test_rows_and_heads_come_in_the_order_asked_for():
    model = FAMILIES["llama"].build()
    whole = attention_maps(model, IDS)
    part = attention_maps(model, IDS, ["1.2", Head(0, 1)], rows=[-1, 3])
    assert torch.equal(part, whole[:, [6, 1]][:, :, [-1, 3]])


def test_maps_show_what_edits_left():
    model = FAMILIES["llama"].build()
    with steer(model, ForceRows(pattern="first", heads="0.1")):
        forced = attention_maps(model, IDS, "0.0-1")
    assert torch.equal(forced[0, 1, :, 0], torch.ones(16))
    torch.testing.assert_close(forced[0, 0], attention_maps(model, IDS, "0.0")[0, 0], atol=1e-5, rtol=0)


def test_padding_attends_to_nothing():
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 4 + [1] * 12])}
    maps = attention_maps(FAMILIES["llama"].build(), inputs, "0.0")
    assert torch.equal(maps[0, 0, 4:, :4], torch.zeros(12, 4))
    torch.testing.assert_close(maps[0, 0, 4:].sum(-1), torch.ones(12))


def test_maps_carry_gradients_when_asked_to():
    model = FAMILIES["llama"].build()
    assert not attention_maps(model, IDS, "0.0").requires_grad
    attention_maps(model, IDS, "0.0", differentiable=True)[..., 0].sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_layer_called_once_per_window_gives_blocks():
    family = FAMILIES["qwen2_5_vl"]
    model = family.build()
    maps = attention_maps(model, family.inputs(model), "vision:0.*")
    assert maps.shape[1] == 4
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))


def test_bad_requests_are_refused():
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=r"row 16 is out of range; there are 16 rows \(0 to 15\)"):
        attention_maps(model, IDS, rows=[16])
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        attention_maps(model, IDS, "7.0")
    with pytest.raises(TypeError, match="inputs"):
        attention_maps(model, cast(Any, "some text"))
    multimodal = FAMILIES["llava"].build()
    with pytest.raises(ValueError, match=r"vision:0\.0 was not called"):
        attention_maps(multimodal, IDS, "vision:0.0")
    with pytest.raises(ValueError, match="AlbertForMaskedLM uses one layer at several depths"):
        attention_maps(FAMILIES["albert"].build(), IDS)
    both = FAMILIES["llava"].inputs(multimodal)
    with pytest.raises(ValueError, match="different shapes"):
        attention_maps(multimodal, both, ["0.0", "vision:0.0"])


def test_head_outputs_feed_ablation_by_mean():
    model = FAMILIES["llama"].build()
    outputs = head_outputs(model, [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}])
    assert outputs.mean()[Head(0, 0)].shape == (8,)
    with torch.no_grad(), steer(model, Ablate(heads="0.0", mode="mean", statistics=outputs)):
        ablated = model(IDS).logits
    assert not torch.allclose(ablated, model(IDS).logits)
    with pytest.raises(ValueError, match="no inputs were given"):
        head_outputs(model, [])


def test_facts_about_inputs():
    llama, t5, vit = (FAMILIES[name].build() for name in ("llama", "t5", "vit"))
    assert (context_length(llama), vocabulary_size(llama)) == (128, VOCAB)
    assert context_length(t5) is None, "relative positions set no limit"
    assert frugal(llama) == {"use_cache": False, "logits_to_keep": 1}
    assert not takes(vit, "input_ids")
    shifted = as_inputs(t5, IDS)["decoder_input_ids"]
    assert torch.equal(shifted[:, 1:], IDS[:, :-1])
    assert context_length(FAMILIES["roberta"].build()) == 127, "positions start behind the padding index"

    class Short:
        model_max_length = 32

    assert context_length(llama, Short()) == 32
