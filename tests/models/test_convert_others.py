"""`convert` on networks of timm and of plain torch: attention known by its structure, the same numbers where nothing is
to change, each mechanism by hand, and what is refused.

timm is not installed in every environment: a network with the parts and names of its VisionTransformer stands for it
here, and the tests at the end run with timm itself where it is.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import headwise as hw
from headwise.attend import HeadOutputs, ScaleHeads
from headwise.attention import (
    AgentAttention,
    MixtureOfHeads,
    NeighborhoodAttention,
    SoftmaxAttention,
    agent_attention,
    neighborhood_mask,
    norm_router,
)
from headwise.attention.sparsifiner import SparsifinerAttention
from headwise.errors import UnsupportedModel
from headwise.models import set_connectivity

WIDTH, HEADS, GRID, PREFIX = 32, 4, (6, 6), 3
# Mechanism -> its class, options that change nothing, options that change something.
SETTINGS: dict[str, tuple[type[nn.Module], dict[str, Any] | None, dict[str, Any]]] = {
    "mixture-of-head": (MixtureOfHeads, {"active": 1.0, "shared": 1.0}, {"active": 0.75, "shared": 0.5}),
    "neighborhood": (NeighborhoodAttention, {"kernel_size": 6}, {"kernel_size": 3}),
    "sparsifiner": (SparsifinerAttention, {"keep": 1.0, "coef_topk": 2}, {"keep": 0.25, "coef_topk": 2}),
    "agent": (AgentAttention, None, {"num_agents": 4}),
}


class Attention(nn.Module):
    """The attributes of timm's layer of this name."""

    def __init__(self, dim: int = WIDTH, num_heads: int = HEADS, qk_norm: bool = False, drop: float = 0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.norm, self.gate = nn.Dropout(0.0), nn.Identity(), None
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention(**options)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=False)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    grid_size = GRID

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(1, WIDTH, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class VisionTransformer(nn.Module):
    num_prefix_tokens = PREFIX

    def __init__(self, **options: Any):
        super().__init__()
        self.patch_embed, self.tokens = PatchEmbed(), nn.Parameter(torch.randn(1, PREFIX, WIDTH))
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = torch.cat([self.tokens.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        for block in self.blocks:
            x = block(x, attn_mask)
        return x


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    made = VisionTransformer(**options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


IMAGES = torch.randn(2, 1, 24, 24, generator=torch.Generator().manual_seed(1))


def run(model: Any, x: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        return model(x)


def one_prefix(model: Any) -> Any:
    """Sparsifiner knows at most a class token."""
    model.num_prefix_tokens, model.tokens = 1, nn.Parameter(model.tokens[:, :1].detach())
    return model


def prepared(name: str) -> Any:
    return one_prefix(network()) if name == "sparsifiner" else network()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_mechanism_goes_in_with_the_same_parameters(name):
    cls, same, other = SETTINGS[name]
    model = prepared(name)
    plain, before = run(model), dict(model.named_parameters())
    if same is not None:
        torch.testing.assert_close(run(hw.convert(copy.deepcopy(model), to=name, **same)), plain, atol=1e-5, rtol=1e-4)
    hw.convert(model, to=name, **other)
    assert all(isinstance(block.attn, cls) for block in model.blocks)
    after = dict(model.named_parameters())
    assert all(after[path] is weight for path, weight in before.items()), "parameters are handed over, not copied"
    if name != "sparsifiner":
        assert set(after) == set(before)
    found = run(model)
    assert not torch.allclose(found, plain, atol=1e-3)
    torch.testing.assert_close(run(copy.deepcopy(model)), found)
    model(IMAGES).square().sum().backward()
    assert all(block.attn.qkv.weight.grad.abs().max() > 0 for block in model.blocks)


def by_hand(model: Any, attend: Any) -> Tensor:
    """The network with `attend(q, k, v)` to `[b h t e]` between its projections."""
    with torch.no_grad():
        x = torch.cat([model.tokens.expand(len(IMAGES), -1, -1), model.patch_embed(IMAGES)], 1)
        for block in model.blocks:
            qkv = block.attn.qkv(block.norm1(x))
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return x


def test_agents_by_hand():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = q[:, :, PREFIX:].mT.flatten(1, 2).unflatten(-1, GRID)
        agents = nn.functional.adaptive_avg_pool2d(grid, (2, 2)).flatten(2).unflatten(1, (HEADS, -1)).mT
        return agent_attention(q, k, v, agents, query_scale=(8**-0.5) ** 0.3, v_shortcut=0.075)

    model = network()
    wanted = by_hand(model, attend)
    torch.testing.assert_close(run(hw.convert(model, to="agent", num_agents=4)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dilation", [1, 2])
def test_neighbourhoods_by_hand(dilation):
    seen = torch.ones(PREFIX + 36, PREFIX + 36, dtype=torch.bool)
    seen[PREFIX:, PREFIX:] = neighborhood_mask(GRID, 3, 1, dilation)
    model = network()
    wanted = by_hand(model, lambda q, k, v: scaled_dot_product_attention(q, k, v, seen))
    hw.convert(model, to="neighborhood", kernel_size=3, dilation=dilation)
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-4)


def test_mixtures_by_hand():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v) * norm_router(q, 2, 1).gates.mT[..., None]

    model = network()
    wanted = by_hand(model, attend)
    hw.convert(model, to="mixture-of-head", active=0.75, shared=0.5)
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-4)


def test_layers_that_are_left_alone_have_heads_too():
    model = network()
    plain = run(model)
    hw.convert(model, to="agent", num_agents=4, layers=[1])
    assert isinstance(model.blocks[0].attn, SoftmaxAttention)
    x = torch.randn(2, 39, WIDTH)
    torch.testing.assert_close(run(model.blocks[0], x), run(network().blocks[0], x))
    assert not torch.allclose(run(model), plain, atol=1e-3)
    with hw.steer(model, ScaleHeads(0.0, heads=["0.1", "1.2"])):
        assert not torch.allclose(run(model), run(network()), atol=1e-3)
    outputs = HeadOutputs()
    with hw.probe(model, outputs):
        run(model)
    assert outputs.values["", 0].shape == (2, 39, HEADS, 8)


def test_what_timms_layers_do_besides_is_refused():
    for options, message in (
        ({"qk_norm": True}, r"blocks\.0\.attn \(Attention\) has q_norm \(LayerNorm\)"),
        ({"drop": 0.1}, r"has proj_drop \(Dropout\)"),
    ):
        model = network(**options)
        before = dict(model.named_modules())
        with pytest.raises(UnsupportedModel, match=message):
            hw.convert(model, to="agent", num_agents=4)
        assert dict(model.named_modules()) == before
    model = network()
    model.blocks[1].attn.bias_table = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn \(Attention\) has bias_table"):
        hw.convert(model, to="agent", num_agents=4)
    model = network()
    model.blocks[0].attn.scale = 1.0
    with pytest.raises(UnsupportedModel, match="scales its scores by 1"):
        hw.convert(model, to="agent", num_agents=4)

    class Rotary(Attention):
        def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = network()
    model.blocks[0].attn = Rotary()
    with pytest.raises(UnsupportedModel, match="is called with rope"):
        hw.convert(model, to="agent", num_agents=4)
    with pytest.raises(UnsupportedModel, match="give the network that holds it"):
        hw.convert(Attention(), to="agent", num_agents=4)
    model = network()
    model.blocks[0].attn.attn_drop.p = 0.1
    with pytest.raises(UnsupportedModel, match="goes into networks of SoftmaxAttention without dropout"):
        hw.convert(model, to="agent", num_agents=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agent", {"num_agents": 25}, "25 for 39 tokens"),
        ("agent", {"num_agents": 4, "layers": [2]}, "layers are"),
        ("neighborhood", {"kernel_size": 7}, "kernel_size 7 times dilation 1 is 7"),
        ("sparsifiner", {"coef_topk": 2}, "num_prefix_tokens 3"),
        ("mixture-of-head", {"active": 2.0}, "active"),
    ],
)
def test_nothing_has_changed_after_a_refusal(name, options, message):
    model = network()
    before, plain = dict(model.named_modules()), run(model)
    with pytest.raises(ValueError, match=message):
        hw.convert(model, to=name, **options)
    assert dict(model.named_modules()) == before and torch.equal(run(model), plain)


def test_masks_are_refused_when_the_network_is_called():
    model = hw.convert(network(), to="agent", num_agents=4)
    with pytest.raises(UnsupportedModel, match="calls it with attn_mask"):
        model(IMAGES, torch.ones(39, 39, dtype=torch.bool))
    with pytest.raises(ValueError, match="43 tokens are not 3 prefix tokens and a grid of 6 x 6"):
        hw.convert(network(), to="neighborhood", kernel_size=3).blocks[0].attn(torch.randn(1, 43, WIDTH))


# torch's own


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True} | options
    made = nn.TransformerEncoder(nn.TransformerEncoderLayer(**given), 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder(batch_first, norm_first):
    x = torch.randn(2, 36, WIDTH) if batch_first else torch.randn(36, 2, WIDTH)
    model = encoder(batch_first=batch_first, norm_first=norm_first)
    plain = run(model, x)
    before = list(model.parameters())
    for name, options in (
        ("mixture-of-head", {"active": 1.0, "shared": 1.0}),
        ("neighborhood", {"kernel_size": 6, "grid_size": (6, 6)}),
        ("neighborhood", {"kernel_size": 36}),
        ("sparsifiner", {"keep": 1.0, "num_tokens": 36, "coef_topk": 2}),
    ):
        made = hw.convert(copy.deepcopy(model), to=name, **options)
        torch.testing.assert_close(run(made, x), plain, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(made(x), 0 * plain)  # with gradients, the other path of torch's layer
    for options in ({"num_agents": 4, "grid_size": (6, 6)}, {"num_agents": 5}):
        made = hw.convert(copy.deepcopy(model), to="agent", **options)
        assert not torch.allclose(run(made, x), plain, atol=1e-3)
    hw.convert(model, to="agent", num_agents=5)
    assert {id(one) for one in before} == {id(one) for one in model.parameters()}


def test_what_torchs_layers_do_besides_is_refused():
    model = hw.convert(encoder(), to="agent", num_agents=5)
    x = torch.randn(2, 36, WIDTH)
    with pytest.raises(UnsupportedModel, match="calls it with key_padding_mask"):
        model(x, src_key_padding_mask=torch.zeros(2, 36, dtype=torch.bool))
    layer = model.layers[0].self_attn
    with pytest.raises(UnsupportedModel, match="one tensor as query, key and value"):
        layer(x, x.clone(), x, need_weights=False)
    with pytest.raises(UnsupportedModel, match="calls it with need_weights"):
        layer(x, x, x)
    with pytest.raises(UnsupportedModel, match="without dropout"):
        hw.convert(encoder(dropout=0.1), to="agent", num_agents=5)
    cross = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=8))
    with pytest.raises(UnsupportedModel, match="keys or values of another width"):
        hw.convert(cross, to="agent", num_agents=5)
    extra = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
    with pytest.raises(UnsupportedModel, match="adds keys and values of its own"):
        hw.convert(extra, to="agent", num_agents=5)
    with pytest.raises(ValueError, match="num_prefix_tokens is 1; give grid_size"):
        hw.convert(encoder(), to="agent", num_agents=5, num_prefix_tokens=1)


# With timm itself


def timms(**options: Any) -> Any:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "in_chans": 1, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
    made = timm.models.VisionTransformer(**(sizes | {"num_classes": 5} | options)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_timms_vision_transformer(name):
    cls, same, other = SETTINGS[name]
    registers = 0 if name == "sparsifiner" else 2
    model = timms(reg_tokens=registers, qkv_bias=True)
    plain = run(model)
    if same is not None:
        made = hw.convert(copy.deepcopy(model), to=name, **same)
        torch.testing.assert_close(run(made), plain, atol=1e-5, rtol=1e-4)
    hw.convert(model, to=name, **other)
    assert all(isinstance(block.attn, cls) for block in model.blocks)
    assert not torch.allclose(run(model), plain, atol=1e-3)
    if name == "sparsifiner":
        set_connectivity(model, "dense")
        torch.testing.assert_close(run(model), plain, atol=1e-5, rtol=1e-4)


def test_timms_other_layers():
    with pytest.raises(UnsupportedModel, match="has q_norm"):
        hw.convert(timms(qk_norm=True), to="agent", num_agents=4)
    timm = pytest.importorskip("timm", reason="timm is not installed")
    eva = timm.models.Eva(img_size=24, patch_size=4, embed_dim=WIDTH, depth=1, num_heads=HEADS)
    with pytest.raises(UnsupportedModel):
        hw.convert(eva, to="agent", num_agents=4)
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UnsupportedModel, match=r"\(WindowAttention\) has"):
        hw.convert(swin, to="agent", num_agents=4)
    resnet = hw.convert(timm.create_model("resnet18"), to="ela-t")
    assert sum(type(part).__name__ == "EfficientLocalAttention" for part in resnet.modules()) == 8
