"""Agents in trained models, through transformers' attention interface: what they compute, what is undone, refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model, ViTConfig, ViTModel

import headwise as hw
from headwise.attend import Ablate, HeadOutputs, ScaleHeads, Sink
from headwise.attention import agent_attention
from headwise.errors import UnsupportedModel
from headwise.hf import probe
from headwise.models import AgentOptions, agent_mode

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture
def vit() -> Any:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=24, patch_size=4, num_channels=1, initializer_range=0.3, **SIZES)).eval()


@pytest.fixture
def bert() -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, initializer_range=0.3, **SIZES)).eval()


PIXELS = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden(model, **inputs) -> torch.Tensor:
    return model(**inputs).last_hidden_state


@torch.no_grad()
def by_hand(model: Any, options: AgentOptions) -> torch.Tensor:
    """The model's own layers, with the attention between its projections written out."""
    x = model.embeddings(PIXELS)
    for layer in model.layers:
        attention, b = layer.attention, len(x)
        y = layer.layernorm_before(x)
        q, k, v = (
            p(y).view(b, 37, 4, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        pooled = nn.functional.adaptive_avg_pool2d(
            attention.q_proj(y)[:, 1:].mT.reshape(b, 32, 6, 6), options.windows()
        )
        agents = pooled.flatten(2).mT.reshape(b, -1, 4, 8).transpose(1, 2)
        sharp = (8**-0.5) ** options.query_scale_exponent
        out = agent_attention(q, k, v, agents, query_scale=sharp, v_shortcut=options.v_shortcut)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.layernorm(x)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [AgentOptions(4), AgentOptions((2, 3), query_scale_exponent=1.0, v_shortcut=0.0)])
def test_a_vision_transformer(vit, options, implementation):
    vit.set_attn_implementation(implementation)
    plain = hidden(vit, pixel_values=PIXELS)
    with agent_mode(vit, options):
        out = hidden(vit, pixel_values=PIXELS)
    torch.testing.assert_close(out, by_hand(vit, options), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, plain, atol=1e-2)
    assert torch.equal(hidden(vit, pixel_values=PIXELS), plain) and vit.config._attn_implementation == implementation


def test_the_name_with_options_of_the_config(vit, tmp_path):
    options = AgentOptions((2, 3), v_shortcut=0.0)
    with agent_mode(vit, options):
        wanted = hidden(vit, pixel_values=PIXELS)
    vit.config.headwise_agent = {"num_agents": [2, 3], "v_shortcut": 0.0}
    vit.save_pretrained(tmp_path)
    loaded = ViTModel.from_pretrained(tmp_path, attn_implementation="headwise-agent").eval()
    assert torch.equal(hidden(loaded, pixel_values=PIXELS), wanted)
    vit.set_attn_implementation("headwise-agent")
    assert torch.equal(hidden(vit, pixel_values=PIXELS), wanted)
    vit.config.headwise_agent = {"agents": 4}
    with pytest.raises(ValueError, match="'agents' is no option; there are grid_size, logits_dtype"):
        hidden(vit, pixel_values=PIXELS)


def test_chosen_layers_and_too_few_tokens(vit):
    plain = hidden(vit, pixel_values=PIXELS)
    with agent_mode(vit, num_agents=4, layers=[1]):
        one = hidden(vit, pixel_values=PIXELS)
    with agent_mode(vit, num_agents=4, layers=[0]), agent_mode(vit, num_agents=4, layers=[1]):
        both = hidden(vit, pixel_values=PIXELS)
    with agent_mode(vit, num_agents=4):
        assert torch.equal(hidden(vit, pixel_values=PIXELS), both)
    assert not torch.allclose(one, both) and not torch.allclose(one, plain)
    with agent_mode(vit, num_agents=25):  # 25 agents are no saving for 37 tokens
        torch.testing.assert_close(hidden(vit, pixel_values=PIXELS), plain, atol=1e-5, rtol=1e-4)
    with agent_mode(vit, num_agents=25, max_share=1.0):
        assert not torch.allclose(hidden(vit, pixel_values=PIXELS), plain, atol=1e-3)


def test_a_padded_text_is_the_short_one(bert):
    ids = torch.randint(1, 50, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(1, 20), torch.zeros(1, 9)], 1).long()
    for implementation in ("sdpa", "eager"):
        bert.set_attn_implementation(implementation)
        with agent_mode(bert, num_agents=5):
            short = hidden(bert, input_ids=ids)
            long = hidden(bert, input_ids=padded, attention_mask=mask)[:, :20]
        torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-4)


def test_another_model_with_the_same_config_is_left_alone(vit):
    other = ViTModel(vit.config).eval()
    plain = hidden(other, pixel_values=PIXELS)
    with pytest.raises(RuntimeError, match="body"), agent_mode(vit, num_agents=4):
        assert torch.equal(hidden(other, pixel_values=PIXELS), plain)
        raise RuntimeError("body")
    assert vit.config._attn_implementation == "sdpa"
    handle = agent_mode(vit, num_agents=4)
    with pytest.raises(RuntimeError, match="already"):
        agent_mode(vit, num_agents=9)
    handle.remove()
    handle.remove()
    assert vit.config._attn_implementation == "sdpa"


def test_heads_are_read_and_edited_and_weights_refused(vit):
    outputs = HeadOutputs()
    with agent_mode(vit, num_agents=4):
        plain = hidden(vit, pixel_values=PIXELS)
        with probe(vit, outputs):
            assert torch.equal(hidden(vit, pixel_values=PIXELS), plain)
        assert outputs.values["", 0].shape == (2, 37, 4, 8)
        with hw.steer(vit, ScaleHeads(heads="0.1", scale=0.0)):
            scaled = hidden(vit, pixel_values=PIXELS)
        assert not torch.allclose(scaled, plain)
        with (
            hw.steer(vit, Ablate(heads="0.1", mode="uniform")),
            pytest.raises(UnsupportedModel, match="layer 0 runs a mechanism"),
        ):
            hidden(vit, pixel_values=PIXELS)
        with probe(vit, Sink()), pytest.raises(UnsupportedModel, match="Sink: layer 0"):
            hidden(vit, pixel_values=PIXELS)
    pruned = copy.deepcopy(vit)
    with torch.no_grad():
        pruned.layers[0].attention.o_proj.weight[:, 8:16] = 0
    with agent_mode(pruned, num_agents=4):
        torch.testing.assert_close(hidden(pruned, pixel_values=PIXELS), scaled)


def test_agents_inside_a_steered_model(vit):
    """The order of the two contexts does not matter."""
    edit = ScaleHeads(heads="1.2", scale=0.5)
    with agent_mode(vit, num_agents=4), hw.steer(vit, edit):
        wanted = hidden(vit, pixel_values=PIXELS)
    with hw.steer(vit, edit), agent_mode(vit, num_agents=4):
        assert torch.equal(hidden(vit, pixel_values=PIXELS), wanted)


def test_the_implied_map_is_what_attentions_shows(vit):
    with agent_mode(vit, num_agents=4), torch.no_grad():
        maps = vit(PIXELS, output_attentions=True).attentions
    assert len(maps) == 2 and maps[0].shape == (2, 4, 37, 37)
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(2, 4, 37))
    assert (torch.linalg.matrix_rank(maps[0].double(), atol=1e-6) <= 4).all()


def test_models_that_agents_would_let_see_the_future_are_refused(vit):
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=4, **SIZES)).eval()
    with pytest.raises(UnsupportedModel, match="main: causal"):
        agent_mode(llama, num_agents=4)
    t5 = T5Model(T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)).eval()
    with pytest.raises(UnsupportedModel, match="decoder: causal"):
        agent_mode(t5, num_agents=4)
    llama.set_attn_implementation("headwise-agent")
    with pytest.raises(UnsupportedModel, match="causal model would see its future"):
        llama(torch.ones(1, 9, dtype=torch.long))


def test_what_does_not_fit_is_refused(vit, bert):
    with pytest.raises(ValueError, match=r"layers \[7\] are none of this model's, 0 to 1"):
        agent_mode(vit, layers=[7])
    with pytest.raises(ValueError, match="options and num_agents are both given"):
        agent_mode(vit, AgentOptions(4), num_agents=4)
    with agent_mode(vit, num_agents=5), pytest.raises(ValueError, match="5, no square number"):
        hidden(vit, pixel_values=PIXELS)
    with agent_mode(vit, num_agents=4, grid_size=(9, 9)), pytest.raises(ValueError, match="37 tokens are not a grid"):
        hidden(vit, pixel_values=PIXELS)
    window = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(3)
    ids = torch.randint(1, 50, (1, 20))
    with agent_mode(bert, num_agents=4), pytest.raises(UnsupportedModel, match="not one of padding alone"):
        hidden(bert, input_ids=ids, attention_mask=window)
    for wrong, said in (
        ({"num_agents": 0}, "num_agents is 0"),
        ({"max_share": 0.0}, "max_share"),
        ({"logits_dtype": "f"}, "'f'"),
    ):
        with pytest.raises(ValueError, match=said):
            AgentOptions(**wrong)
