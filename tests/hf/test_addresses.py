"""Every head of every family has its address, its module and its slice of the output projection."""

from typing import Any

import pytest
import torch
import transformers as hf
from tests.zoo import FAMILIES, OFF_INTERFACE, VOCAB, families
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.attend.addresses import Head
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules, heads_of, layout, tower_kinds, unwrap
from headwise.hf.projections import attention_shape, head_writes, output_projection, projection_bias


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_that_of_the_family(name):
    model = FAMILIES[name].build()
    towers = {tower.name: (tower.heads, tower.kv_heads) for tower in layout(model).towers}
    assert towers == FAMILIES[name].towers
    assert list(towers) == list(FAMILIES[name].towers), "the main tower comes first"
    assert tower_kinds(model) == FAMILIES[name].causal


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_and_shapes_are_those_that_attention_is_called_with(name, monkeypatch):
    family = FAMILIES[name]
    model = family.build()
    calls = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *args, **kwargs):
        calls.append((module, query.shape[1], key.shape[1], value.shape[-1]))
        return stock(module, query, key, value, None, dropout=0.0, scaling=kwargs.get("scaling"))

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    for part in model.modules():  # families without sdpa go through the same door here
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "sdpa"
    with torch.no_grad():
        model(**family.inputs(model, length=24))
    expected = {module: attention_shape(module) for module in attention_modules(model)}
    assert {module: tuple(shape) for module, *shape in calls} == {m: tuple(shape) for m, shape in expected.items()}
    first_calls = list(dict.fromkeys(module for module, *_ in calls))
    by_tower: dict[str, list[int]] = {}
    for module in first_calls:
        tower, layer = attention_modules(model)[module]
        by_tower.setdefault(tower, []).append(layer)
    assert all(layers == sorted(layers) for layers in by_tower.values()), "layers count in the order of the forward"


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_write_slices_of_the_output_projection(name):
    """Feeding one head's slice alone through the projection gives its write and the bias."""
    model = FAMILIES[name].build()
    for module in attention_modules(model):
        shape = attention_shape(module)
        projection = output_projection(module, model)
        z = torch.randn(3, shape.heads, shape.value_dim)
        with torch.no_grad():
            writes = torch.einsum("nhe,hec->nhc", z, head_writes(projection, shape.heads))
            whole = projection(z.flatten(1))
        torch.testing.assert_close(writes.sum(1) + projection_bias(projection), whole, rtol=1e-5, atol=1e-5)


def test_a_projection_of_another_make_is_read_through_its_action():
    class Doubled(nn.Module):
        """A linear map that keeps its matrix in a form of its own."""

        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

        def forward(self, x):
            return 2 * self.inner(x)

    inner = nn.Linear(8, 6)
    torch.testing.assert_close(head_writes(Doubled(inner), 2), 2 * inner.weight.T.reshape(2, 4, 6))
    torch.testing.assert_close(projection_bias(Doubled(inner)), 2 * inner.bias)


def test_heads_are_listed_with_the_paths_of_their_modules():
    model = FAMILIES["llava"].build()
    records = heads_of(model)
    assert [str(record.head) for record in records[:5]] == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    assert records[2].head.key == 1
    assert records[-1].head == Head(1, 3, "vision")
    for record in records:
        assert model.get_submodule(record.path) is record.module
    assert records[0].path.endswith("language_model.layers.0.self_attn")


def test_hybrid_models_are_numbered_by_decoder_layer():
    model = FAMILIES["qwen3_next"].build()
    assert list(attention_modules(model).values()) == [("", 1)]


def test_one_layer_of_nested_lists_is_layer_zero():
    config = FAMILIES["t5"].build().config
    config.num_layers = config.num_decoder_layers = 1
    assert {tower.layers for tower in layout(hf.T5ForConditionalGeneration(config)).towers} == {1}


def test_hierarchical_towers_are_numbered_in_order():
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=2)
    tower = layout(hf.SwinModel(config)).main
    assert tower.heads == (2, 2, 4)


def test_parts_of_models_have_addresses_too():
    """A decoder without its head, and one tower taken out of a model of two."""
    assert layout(FAMILIES["llama"].build().model).main.name == ""
    assert [tower.name for tower in layout(FAMILIES["llava"].build().model).towers] == ["", "vision"]
    assert [tower.name for tower in layout(FAMILIES["clip"].build().text_model).towers] == [""]
    assert tower_kinds(FAMILIES["clip"].build().text_model) == {"": "causal"}


def test_what_a_whole_model_masks_says_nothing_of_its_vision_tower():
    text: Any = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.PaliGemmaConfig(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8})
    assert tower_kinds(hf.PaliGemmaForConditionalGeneration(config)) == {"": "causal", "vision": "bidirectional"}


def test_a_decoder_that_also_masks_its_encoder_is_causal():
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": VOCAB, "max_position_embeddings": 32, "num_experts": 2}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    kinds = tower_kinds(hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**sizes)))
    assert kinds == {"encoder": "bidirectional", "decoder": "causal", "cross": "cross"}


def test_cross_attention_inside_a_decoder_is_a_tower_of_its_own():
    config = hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    model = hf.GPT2LMHeadModel(config)
    assert [tower.name for tower in layout(model).towers] == ["", "cross"]
    assert tower_kinds(model) == {"": "causal", "cross": "cross"}


def test_two_models_joined_to_an_encoder_decoder():
    def bert():
        return hf.BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )

    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert(), bert())
    joined = hf.EncoderDecoderModel(config=config)
    assert {t.name: t.heads for t in layout(joined).towers} == dict.fromkeys(("decoder", "encoder", "cross"), (4, 4))
    assert tower_kinds(joined) == {"encoder": "bidirectional", "decoder": "causal", "cross": "cross"}


@pytest.mark.parametrize("name", OFF_INTERFACE)
def test_models_off_the_interface_are_refused_by_name(name):
    model = OFF_INTERFACE[name]()
    with pytest.raises(UnsupportedModel, match=type(model).__name__) as error:
        layout(model)
    assert "use a class" in str(error.value) or "load the network with" in str(error.value)


def test_wrappers_are_looked_through():
    model = FAMILIES["llama"].build()
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert layout(nn.DataParallel(model)) == layout(model)


def test_a_projection_that_does_not_fit_is_refused():
    model = FAMILIES["llama"].build()
    module = next(iter(attention_modules(model)))
    module.o_proj = nn.Linear(20, 32)
    with pytest.raises(UnsupportedModel, match=r"LlamaAttention: one of width 20 .* \(32 features\)"):
        output_projection(module)


def test_the_projection_beside_the_module_needs_the_model():
    model = FAMILIES["bert"].build()
    module = next(iter(attention_modules(model)))
    with pytest.raises(UnsupportedModel, match="give the model too"):
        output_projection(module)
    assert output_projection(module, model) is model.bert.encoder.layer[0].attention.output.dense


def test_families_can_be_chosen_by_fact():
    assert families(sinks=True) == ["gpt_oss"]
