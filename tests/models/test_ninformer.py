"""NiNformer: official weights (fixture: `make oracles`), one norm or two, sizes and operations."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from headwise.models import NiNformerConfig, NiNformerForImageClassification, SmallViT, SmallViTConfig, ninformer_state
from headwise.ops import flops

FIXTURE = Path(__file__).parents[1] / "fixtures" / "ninformer.safetensors"


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    with safe_open(FIXTURE, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def official(given) -> dict[str, torch.Tensor]:
    return {name.removeprefix("state."): value for name, value in given.items() if name.startswith("state.")}


def small(**changes) -> NiNformerForImageClassification:
    sizes = {
        "image_size": 12,
        "patch_size": 4,
        "in_channels": 1,
        "num_classes": 5,
        "dim": 16,
        "ffn_dim": 24,
        "depth": 2,
    }
    torch.manual_seed(0)
    return NiNformerForImageClassification(NiNformerConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize("share_norm", [True, False])
def test_official_weights(given, share_norm):
    model = small(share_norm=share_norm)
    model.load_state_dict(ninformer_state(official(given), share_norm=share_norm))
    with torch.no_grad():
        gate = model.blocks[0].gate
        torch.testing.assert_close(gate.mix(given["tokens"]), given["mix"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gate(given["tokens"]), given["gate"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(model(given["pixels"]).logits, given["logits"], atol=1e-6, rtol=1e-5)


def test_a_name_of_another_network_is_refused(given):
    with pytest.raises(ValueError, match=r"'model\.0\.attn\.weight' is no parameter of the official NiNformer"):
        ninformer_state({"model.0.attn.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="norm2"):
        small(share_norm=False).load_state_dict(ninformer_state(official(given)))


def test_a_shared_norm_is_one_module():
    shared, apart = small(), small(share_norm=False)
    assert "blocks.0.norm2.weight" not in shared.state_dict()
    x = torch.randn(2, 1, 12, 12)
    apart.load_state_dict(shared.state_dict(), strict=False)
    torch.testing.assert_close(apart(x).logits, shared(x).logits)
    with torch.no_grad():
        apart.blocks[0].norm2.weight.mul_(2)
        before = shared(x).logits
        shared.blocks[0].norm.weight.mul_(2)
    assert not torch.allclose(apart(x).logits, before) and not torch.allclose(apart(x).logits, shared(x).logits)


def test_a_block_by_hand():
    model, x = small(), torch.randn(2, 1, 12, 12)
    tokens = model.patcher(x).flatten(2).mT
    for block in model.blocks:
        tokens = tokens + block.gate(block.norm(tokens))
        tokens = tokens + block.down(nn.functional.gelu(block.up(block.norm(tokens))))
    torch.testing.assert_close(model(x).logits, model.classifier(tokens.mean(1)))


def test_official_sizes():
    model = NiNformerForImageClassification(NiNformerConfig())
    assert sum(p.numel() for p in model.parameters()) == 2_652_170
    assert sum(p.numel() for p in model.blocks.parameters()) == 2_637_056
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 659_264
    assert model.config.num_tokens == 64 and model.blocks[0].norm.eps == 1e-5


@pytest.mark.parametrize(("tokens", "millions"), [(64, 218.1), (256, 872.4)])
def test_operations(tokens, millions):
    side = round(tokens**0.5)
    model = NiNformerForImageClassification(NiNformerConfig(4 * side, dropout=0.0, depth=1))
    found = flops(model.blocks[0], (torch.zeros(1, tokens, 256),)) / 2
    assert found == tokens * (2 * 512 * 256 + 2 * 512 * 256 + 256 * 256 + 2 * 512 * 256)
    assert round(4 * found / 1e6, 1) == millions


def test_the_gate_stands_in_the_small_transformer():
    model = SmallViT(SmallViTConfig(attention="MixerGate", attention_options={"token_hidden": 8}))
    assert model(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 5}, "patch_size 5 does not divide image_size 12"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"depth": -1}, "depth -1"),
        ({"dim": -16}, "dim -16"),
        ({"dropout": 1.0}, r"dropout 1\.0"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 16, 16\); this model mixes 9 tokens and takes \(1, 12, 12\)"):
        small()(torch.zeros(1, 1, 16, 16))
