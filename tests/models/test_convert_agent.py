"""Agents for good: `convert(model, to="agent")` on transformers', headwise's own and diffusers-like networks."""

import copy
from typing import Any

import pytest
import torch
from tests.models.test_diffusion_agents import SAMPLE, Network, Plain
from tests.models.test_training_free_agents import PIXELS, SIZES, by_hand, hidden
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import headwise as hw
from headwise.attend import HeadOutputs, ScaleHeads, Sink
from headwise.attention import AgentAttention
from headwise.errors import UnsupportedModel
from headwise.hf import probe
from headwise.models import LATE, AgentOptions, DiffusionOptions, agent_diffusion, agent_mode
from headwise.models.small_vit import SmallViT, SmallViTConfig


def vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(image_size=24, patch_size=4, num_channels=1, initializer_range=0.3, **SIZES)).eval()


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_vision_transformer(base, tmp_path):
    model, options = vit(), AgentOptions((2, 3), v_shortcut=0.0)
    model.set_attn_implementation(base)
    plain, wanted = hidden(model, pixel_values=PIXELS), by_hand(model, options)
    assert hw.convert(model, to="agent", num_agents=(2, 3), v_shortcut=0.0) is model
    found = hidden(model, pixel_values=PIXELS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = ViTModel.from_pretrained(tmp_path, attn_implementation="headwise-agent").eval()
    assert torch.equal(hidden(again, pixel_values=PIXELS), found)
    assert torch.equal(hidden(copy.deepcopy(model), pixel_values=PIXELS), found)
    with pytest.raises(ValueError, match="another mechanism's already"):
        hw.convert(model, to="agent")
    model.set_attn_implementation(base)
    assert torch.equal(hidden(model, pixel_values=PIXELS), plain)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_layers_that_are_not_named_keep_their_attention(base):
    model = vit()
    model.set_attn_implementation(base)
    with agent_mode(model, num_agents=4, layers=[1]):
        wanted = hidden(model, pixel_values=PIXELS)
    hw.convert(model, to="agent", num_agents=4, layers=[1])
    torch.testing.assert_close(hidden(model, pixel_values=PIXELS), wanted, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(model)
    assert torch.equal(hidden(twin, pixel_values=PIXELS), hidden(model, pixel_values=PIXELS))
    sink = Sink()
    with probe(model, sink), pytest.raises(UnsupportedModel, match="Sink: layer 1"):
        hidden(model, pixel_values=PIXELS)  # the first layer was read
    outputs = HeadOutputs()
    with hw.steer(model, ScaleHeads(heads="0.1", scale=0.0)), probe(model, outputs):
        hidden(model, pixel_values=PIXELS)
    assert not outputs.values["", 0][:, :, 1].any() and outputs.values["", 1].any()


def test_a_padded_text():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=50, initializer_range=0.3, **SIZES)).eval()
    ids = torch.randint(1, 50, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(1, 20), torch.zeros(1, 9)], 1).long()
    hw.convert(bert, to="agent", num_agents=5, layers=[0])
    long = hidden(bert, input_ids=padded, attention_mask=mask)[:, :20]
    torch.testing.assert_close(long, hidden(bert, input_ids=ids), atol=1e-5, rtol=1e-4)


def test_own_networks(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)
    model: Any = SmallViT(SmallViTConfig(patch_size=1)).eval()
    plain, weights = model(x).logits, {name: value.clone() for name, value in model.state_dict().items()}
    hw.convert(model, to="agent", num_agents=4, layers=[0])
    layer: Any = model.blocks[0].attn
    assert isinstance(layer, AgentAttention) and type(model.blocks[1].attn).__name__ == "SoftmaxAttention"
    assert layer.query_scale == pytest.approx((layer.head_dim**-0.5) ** 0.3) and layer.v_shortcut == 0.075
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in weights.items()
    }, "not one parameter is new or another"
    found = model(x).logits
    assert not torch.allclose(found, plain, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(SmallViT.from_pretrained(tmp_path).eval()(x).logits, found)


def test_a_diffusion_network():
    torch.manual_seed(0)
    network, options = Network().eval(), DiffusionOptions(ratio=0.4, agent_ratio=0.9, stride=(4, 4))
    pipe = type("Pipe", (), {"unet": network})()
    with torch.no_grad():
        plain = network(SAMPLE)
        with agent_diffusion(network, options):
            wanted = network(SAMPLE)
        assert hw.convert(pipe, to="agent", ratio=0.4, agent_ratio=0.9, early_steps=2) is pipe
        found = network(SAMPLE)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match="has agents already"):
        hw.convert(network, to="agent")
    handle: Any = network.agent_diffusion
    handle.at_step(None, 1, None, {})
    assert handle.options == LATE
    handle.remove()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network(SAMPLE), plain, strict=True))
    assert isinstance(network.fine.attn1.processor, Plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.4}, "ratio is no option for transformers models; there are grid_size"),
        ({"num_agents": 0}, "num_agents is 0"),
        ({"layers": [7]}, "layers are"),
        ({"agents": 4}, "'agents' is no option of agent"),
    ],
)
def test_what_a_transformers_model_refuses(options, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        hw.convert(model, to="agent", **options)
    assert model.config._attn_implementation == "sdpa"


def test_what_other_networks_refuse():
    small = SmallViT(SmallViTConfig())
    before = dict(small.named_modules())
    with pytest.raises(ValueError, match="num_agents is 49, 49 for 16 tokens; expected fewer than 50%"):
        hw.convert(small, to="agent", num_agents=49)
    with pytest.raises(ValueError, match="seed is no option for networks of dense layers"):
        hw.convert(small, to="agent", num_agents=4, seed=1)
    causal = SmallViT(SmallViTConfig(attention_options={"is_causal": True}))
    with pytest.raises(UnsupportedModel, match="layer 0 is causal"):
        hw.convert(causal, to="agent", num_agents=4)
    assert dict(small.named_modules()) == before
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=4, **SIZES)).eval()
    with pytest.raises(UnsupportedModel, match="main: causal"):
        hw.convert(llama, to="agent", num_agents=4)
    with pytest.raises(ValueError, match="num_agents is no option for diffusion networks"):
        hw.convert(Network(), to="agent", num_agents=4)
    with pytest.raises(ValueError, match="chosen by max_downsample"):
        hw.convert(Network(), to="agent", layers=[0])
    with pytest.raises(UnsupportedModel, match="not a transformers model"):
        hw.convert(nn.Linear(2, 2), to="agent")
    with pytest.raises(UnsupportedModel, match="str is no network and has no unet"):
        hw.convert("pipe", to="agent")
