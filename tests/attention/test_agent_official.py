"""Outside implementations agree with ours for the same weights (fixture: `make oracles`)."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from headwise.attention import AgentAttention
from headwise.models import AgentDeiT, AgentDeiTConfig, agent_deit_state

FIXTURE = Path(__file__).parents[1] / "fixtures" / "agent_attention.safetensors"


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    with safe_open(FIXTURE, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def part(given, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


def test_the_official_layer(given):
    layer = AgentAttention(32, 4, 9, grid_size=(6, 6), num_prefix_tokens=1).eval()
    layer.load_state_dict(part(given, "layer."))
    with torch.no_grad():
        out = layer(given["layer_x"])
    torch.testing.assert_close(out, given["layer_out"], atol=1e-5, rtol=1e-5)


def test_the_official_network(given):
    config = AgentDeiTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_agents=4, num_agent_layers=2, num_labels=5,
    )  # fmt: skip
    model = AgentDeiT(config).eval()
    model.load_state_dict(agent_deit_state({"model": part(given, "network.")}, config))
    with torch.no_grad():
        out = model(given["network_x"]).logits
    torch.testing.assert_close(out, given["network_out"], atol=1e-4, rtol=1e-5)


def test_the_package_with_learned_agents(given):
    """agent-attention-pytorch: learned agents, no pooling, bias or convolution; without talking heads and gates."""
    state = part(given, "learned.")
    layer = AgentAttention(32, 4, 5, agents="learned", position_bias=False, dwc=False, qkv_bias=False).eval()
    names = {"agents": "agent_tokens", "qkv.weight": "to_qkv.0.weight", "proj.weight": "to_out.1.weight"}
    layer.load_state_dict({ours: state[theirs] for ours, theirs in names.items()} | {"proj.bias": torch.zeros(32)})
    with torch.no_grad():
        out = layer(given["learned_x"])
    torch.testing.assert_close(out, given["learned_out"], atol=1e-6, rtol=1e-5)
