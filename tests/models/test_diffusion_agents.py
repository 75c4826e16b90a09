"""AgentSD in a small diffusers network (extra: diffusion), and what does not need diffusers."""

import pytest
import torch
from torch import nn

from headwise.attention import agent_attention
from headwise.errors import UnsupportedModel
from headwise.models import EARLY, LATE, DiffusionOptions, agent_diffusion
from headwise.ops.token_merging import match_tokens


def split(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class Attention(nn.Module):
    """The part of diffusers' attention that processors use."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.processor = Plain()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, hidden_states, **kwargs):
        return self.processor(self, hidden_states, **kwargs)


class Plain:
    def __call__(self, attn, x, **kwargs):
        q, k, v = (split(part(x), attn.heads) for part in (attn.to_q, attn.to_k, attn.to_v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(16), Attention()

    def forward(self, hidden_states):
        return hidden_states + self.attn1(self.norm1(hidden_states))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = BasicTransformerBlock(), BasicTransformerBlock()

    def forward(self, sample):
        x = self.fine(sample.flatten(2).mT)
        half = nn.functional.avg_pool2d(x.mT.unflatten(-1, sample.shape[2:]), 2)
        return x, self.coarse(half.flatten(2).mT)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval()


SAMPLE = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_block_by_hand(network):
    options = DiffusionOptions(ratio=0.4, agent_ratio=0.9, stride=(4, 4))
    plain = network(SAMPLE)
    with agent_diffusion(network, options):
        fine, coarse = network(SAMPLE)
    block, states = network.fine, SAMPLE.flatten(2).mT
    normed = block.norm1(states)
    merging = match_tokens(states, (12, 8), int(96 * 0.4), stride=(4, 4))  # one picture: no random destinations
    tokens, few = merging.merge(normed), merging.merge(normed, int(96 * 0.9))
    attn = block.attn1
    q, k, v, agents = (
        split(p(x), 2) for p, x in ((attn.to_q, tokens), (attn.to_k, tokens), (attn.to_v, tokens), (attn.to_q, few))
    )
    out = agent_attention(q, k, v, agents, query_scale=8**-0.15, v_shortcut=0.075)
    wanted = states + merging.unmerge(attn.to_out[0](out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(fine, wanted)
    half = nn.functional.avg_pool2d(fine.mT.unflatten(-1, (12, 8)), 2).flatten(2).mT
    torch.testing.assert_close(coarse, network.coarse(half))  # a coarser block is left alone
    assert all(torch.equal(a, b) for a, b in zip(network(SAMPLE), plain, strict=True))
    assert isinstance(network.fine.attn1.processor, Plain) and not network.fine._forward_pre_hooks


@torch.no_grad()
def test_agents_are_used_only_where_they_are_few(network):
    """The paper's later setting merges tokens and has more agents than half of what is left."""
    with agent_diffusion(network, LATE):
        fine, _ = network(SAMPLE)
    states = SAMPLE.flatten(2).mT
    merging = match_tokens(states, (12, 8), int(96 * 0.4), stride=(2, 2))
    wanted = states + merging.unmerge(Plain()(network.fine.attn1, merging.merge(network.fine.norm1(states))))
    torch.testing.assert_close(fine, wanted)
    with agent_diffusion(network, DiffusionOptions(ratio=0.0)):
        torch.testing.assert_close(network(SAMPLE)[0], network(SAMPLE)[0])


@torch.no_grad()
def test_the_schedule_and_the_draws(network):
    pair = torch.cat([SAMPLE, SAMPLE])
    with agent_diffusion(network, early_steps=2, seed=5) as first:
        one = [network(pair)[0] for _ in range(2)]
        assert first.at_step(None, 0, None, {"a": 1}) == {"a": 1} and first.options == EARLY
        first.at_step(None, 1, None, {})
        assert first.options == LATE
    assert not torch.equal(one[0], one[1]), "each step draws its destinations"
    with agent_diffusion(network, seed=5):
        assert torch.equal(network(pair)[0], one[0])


def test_it_is_undone_once_and_after_an_error(network):
    with pytest.raises(RuntimeError, match="body"), agent_diffusion(network) as handle:
        raise RuntimeError("body")
    handle.remove()
    assert isinstance(network.coarse.attn1.processor, Plain) and not network._forward_pre_hooks


def test_what_is_refused(network):
    with pytest.raises(UnsupportedModel, match="Linear holds no BasicTransformerBlock"):
        agent_diffusion(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="str has no unet"):
        agent_diffusion("pipe")
    with pytest.raises(ValueError, match=r"ratio 1\.0"):
        DiffusionOptions(ratio=1.0)
    with agent_diffusion(network), pytest.raises(UnsupportedModel, match="a context or a mask"):
        network.fine.attn1(torch.zeros(1, 4, 16), attention_mask=torch.ones(1, 4))


@torch.no_grad()
def test_a_diffusers_network():
    diffusers = pytest.importorskip("diffusers", reason="extra diffusion: diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip
    given = {"sample": torch.randn(2, 4, 16, 16), "timestep": 3, "encoder_hidden_states": torch.randn(2, 5, 32)}
    plain = unet(**given).sample
    processors = {name: type(one) for name, one in unet.attn_processors.items()}
    with agent_diffusion(unet, DiffusionOptions(ratio=0.0)):
        torch.testing.assert_close(unet(**given).sample, plain, atol=1e-5, rtol=1e-4)
    with agent_diffusion(unet):
        changed = unet(**given).sample
    assert torch.isfinite(changed).all() and not torch.allclose(changed, plain)
    assert {name: type(one) for name, one in unet.attn_processors.items()} == processors
    torch.testing.assert_close(unet(**given).sample, plain, atol=1e-6, rtol=1e-5)
