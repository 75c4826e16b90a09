"""Agent-DeiT: the paper's sizes, official names, other resolutions. Saving, loading and batches are the contract's."""

import pytest
import torch

import headwise as hw
from headwise.attend import Ablate
from headwise.attention import AgentAttention, SoftmaxAttention
from headwise.models import AgentDeiT, AgentDeiTConfig, agent_deit_state
from headwise.ops import flops


def small(**changes) -> AgentDeiT:
    torch.manual_seed(0)
    options = {
        "image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_agents": 4, "num_labels": 5,
    }  # fmt: skip
    return AgentDeiT(AgentDeiTConfig(**{**options, **changes})).eval()


@pytest.mark.parametrize(
    ("size", "millions", "gigaflops"), [("tiny", 6.0, 1.2), ("small", 22.6, 4.4), ("base", 87.2, 17.5)]
)
def test_the_papers_sizes(size, millions, gigaflops):
    model = AgentDeiT(AgentDeiTConfig.preset(size)).eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert round(flops(model, (torch.zeros(1, 3, 224, 224),)) / 2e9, 1) == gigaflops
    agents = [isinstance(block.attn, AgentAttention) for block in model.blocks]
    assert sum(agents) == (4 if size == "base" else 12) and all(agents[: sum(agents)])
    assert isinstance(model.blocks[-1].attn, SoftmaxAttention if size == "base" else AgentAttention)


def test_high_resolution_costs_what_the_paper_says():
    model = AgentDeiT(AgentDeiTConfig.preset("small", image_size=448)).eval()
    found = flops(model, (torch.zeros(1, 3, 448, 448),)) / 2e9
    assert abs(found - 17.7) < 0.1


def test_layers_and_tokens():
    model = small(distilled=True, num_agent_layers=1)
    assert [type(block.attn).__name__ for block in model.blocks] == ["AgentAttention", "SoftmaxAttention"]
    x = torch.randn(2, 1, 16, 16)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 18, 32)
    wanted = (model.head(tokens[:, 0]) + model.distillation_logits(tokens)) / 2
    torch.testing.assert_close(model(x).logits, wanted)
    with pytest.raises(ValueError, match=r"config.distilled is False"):
        small().distillation_logits(tokens)


def test_another_resolution_loads():
    model, larger = small(num_agent_layers=1), small(image_size=32, num_agent_layers=1)
    larger.load_state_dict(agent_deit_state({"model": model.state_dict()}, larger.config))
    resized = small(num_agent_layers=1)
    resized.blocks[0].attn.resize_grid((8, 8))
    for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias", "an_bias"):
        torch.testing.assert_close(getattr(larger.blocks[0].attn, name), getattr(resized.blocks[0].attn, name))
    assert torch.equal(larger.pos_embed[:, 0], model.pos_embed[:, 0]) and larger.pos_embed.shape[1] == 65
    same = agent_deit_state({f"module.{name}": value for name, value in model.state_dict().items()}, model.config)
    assert all(torch.equal(same[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="17 places, which are not 2 prefix tokens"):
        agent_deit_state(model.state_dict(), AgentDeiTConfig.example())


def test_layers_are_skipped_in_training_only():
    model, x = small(drop_path_rate=0.9, num_hidden_layers=3), torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(model(x).logits, model(x).logits)
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(x).logits, model(x).logits)
    assert [block.skipped for block in model.blocks] == [0.0, 0.45, 0.9]


def test_heads_are_edited():
    model, x = small(), torch.randn(2, 1, 16, 16)
    plain = model(x).logits
    with hw.steer(model, Ablate(heads="1.0", mode="zero")):
        assert not torch.allclose(model(x).logits, plain)
    assert torch.equal(model(x).logits, plain)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch_size 5 does not divide image_size 16"):
        small(patch_size=5)
    with pytest.raises(ValueError, match=r"pixel_values are \(1, 8, 8\), expected \(1, 16, 16\)"):
        small()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="num_agents is 5, no square"):
        small(num_agents=5)
