"""DaViT against timm's and Florence-2's numbers, its counts, its pyramid, and the layouts of checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import headwise as hw
from headwise.attend import Ablate, HeadOutputs
from headwise.hf import probe
from headwise.models import DaViT, DaViTConfig, DaViTForImageClassification, convert_davit_state_dict
from headwise.models.davit import _DropPath

FIXTURE = Path(__file__).parents[1] / "fixtures" / "davit.safetensors"


@pytest.fixture(scope="module")
def numbers():
    return load_file(FIXTURE)


def shape() -> dict:
    with safe_open(FIXTURE, "pt") as file:
        return json.loads(file.metadata()["shape"])


def config(**changes) -> DaViTConfig:
    known = shape()
    return DaViTConfig(
        depths=known["depths"], hidden_sizes=known["widths"], num_heads=known["heads"], window_size=known["window"],
        **changes,
    )  # fmt: skip


def weights(numbers, name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}.weights."
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


@pytest.mark.parametrize(("name", "variant"), [("timm", "davit"), ("timm-v2", "florence2")])
def test_equals_timm(numbers, name, variant):
    model = DaViTForImageClassification(config(variant=variant, num_labels=5)).eval()
    state = weights(numbers, name)
    model.load_state_dict(state)  # timm's own names
    assert {k: v.data_ptr() for k, v in convert_davit_state_dict(state).items()} == {
        k: v.data_ptr() for k, v in state.items()
    }
    for number in range(3):
        x, logits = numbers[f"{name}.{number}.x"], numbers[f"{name}.{number}.logits"]
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.forward_features(x), numbers[f"{name}.{number}.map"], atol=1e-5, rtol=1e-5)


def test_equals_florence2(numbers):
    model = DaViT(config(variant="florence2")).eval()
    model.load_state_dict(convert_davit_state_dict(weights(numbers, "florence2")))
    for number in range(3):
        with torch.no_grad():
            maps = model(numbers[f"florence2.{number}.x"]).feature_maps
        torch.testing.assert_close(maps[-1], numbers[f"florence2.{number}.map"], atol=1e-5, rtol=1e-5)


def test_the_variants_are_not_the_same(numbers):
    """The roles of q, k and v: a checkpoint loads into the other variant where shapes allow it, and means nothing."""
    model = DaViTForImageClassification(config(num_labels=5)).eval()
    model.load_state_dict(weights(numbers, "timm"))
    for stage in model.stages:
        for two in stage.blocks:
            two[1].attn.variant = "florence2"
    with torch.no_grad():
        assert (model(numbers["timm.0.x"]).logits - numbers["timm.0.logits"]).abs().max() > 1e-3


# Layouts, written from the names that the other codes give: each is turned into ours and back by hand here.


def official(name: str) -> str:
    for ours, theirs in [
        ("stem.conv.", "patch_embeds.0.proj."), ("stem.norm.", "patch_embeds.0.norm."), (".cpe1.", ".cpe.0."),
        (".cpe2.", ".cpe.1."), ("head.norm.", "norms."), ("head.fc.", "head."),
    ]:  # fmt: skip
        name = name.replace(ours, theirs)
    for stage in range(2):
        name = name.replace(f"stages.{stage}.downsample.conv.", f"patch_embeds.{stage}.proj.")
        name = name.replace(f"stages.{stage}.downsample.norm.", f"patch_embeds.{stage}.norm.")
        name = name.replace(f"stages.{stage}.blocks.", f"main_blocks.{stage}.")
    return name


def hub(name: str) -> str:
    """The files of microsoft/Florence-2 before transformers had the class."""
    for stage in range(2):
        name = name.replace(f"stages.{stage}.downsample.conv.", f"convs.{stage}.proj.")
        name = name.replace(f"stages.{stage}.downsample.norm.", f"convs.{stage}.norm.")
        for pair in range(2):
            for number, kind in enumerate(("spatial", "channel")):
                before = f"stages.{stage}.blocks.{pair}.{number}."
                if not name.startswith(before):
                    continue
                attention = "window_attn" if kind == "spatial" else "channel_attn"
                rest = name.removeprefix(before)
                for ours, theirs in [
                    ("cpe1.proj.", "conv1.fn.dw."), ("cpe2.proj.", "conv2.fn.dw."), ("norm1.", f"{attention}.norm."),
                    ("attn.", f"{attention}.fn."), ("norm2.", "ffn.norm."), ("mlp.", "ffn.fn.net."),
                ]:  # fmt: skip
                    if rest.startswith(ours):
                        rest = theirs + rest.removeprefix(ours)
                        break
                name = f"blocks.{stage}.{pair}.{kind}_block.{rest}"
    return name.replace("stem.conv.", "convs.0.proj.").replace("stem.norm.", "convs.0.norm.")


def test_the_official_layout():
    state = DaViTForImageClassification(config(num_labels=5)).state_dict()
    theirs = {official(name): value for name, value in state.items()}
    assert "main_blocks.0.0.1.cpe.1.proj.weight" in theirs and "norms.bias" in theirs and "head.weight" in theirs
    for prefix in ("", "module."):
        found = convert_davit_state_dict({prefix + name: value for name, value in theirs.items()})
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_the_hub_layout_inside_a_whole_model():
    state = DaViT(config(variant="florence2")).state_dict()
    theirs = {"vision_tower." + hub(name): value for name, value in state.items()}
    assert "vision_tower.blocks.1.0.channel_block.channel_attn.fn.qkv.weight" in theirs
    found = convert_davit_state_dict({**theirs, "language_model.model.shared.weight": torch.zeros(1)})
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_strange_keys_are_listed():
    state = DaViT(config()).state_dict()
    with pytest.raises(ValueError, match=r"1 keys have no place here: stages\.0.*attn\.relative_position_bias"):
        convert_davit_state_dict({**state, "stages.0.blocks.0.0.attn.relative_position_bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="of no layout that is known"):
        convert_davit_state_dict({"patch_embed.weight": torch.zeros(1)})


# Sizes


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 28_360_168),
        ("small", 49_745_896),
        ("base", 87_954_408),
        ("large", 196_811_752),
        ("huge", 348_922_856),
        ("giant", 1_406_470_120),
    ],
)
def test_presets_have_their_parameters(name, count):
    with torch.device("meta"):
        model = DaViTForImageClassification(DaViTConfig.preset(name, num_labels=1000))
    assert sum(p.numel() for p in model.parameters()) == count


def test_florence2_base_has_its_parameters():
    with torch.device("meta"):
        pyramid = DaViT(DaViTConfig.preset("florence2-base"))
        model = DaViTForImageClassification(DaViTConfig.preset("florence2-base", num_labels=0))  # with its last norm
    assert sum(p.numel() for p in pyramid.parameters()) == 90_370_048 - 2 * 1024
    assert sum(p.numel() for p in model.parameters()) == 90_370_048


def test_the_pyramid():
    names = ["stage1", "stage2"]
    model = DaViT(config(out_features=names)).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 40, 30)).feature_maps
    assert [tuple(one.shape) for one in maps] == [(1, 16, 10, 8), (1, 24, 5, 4)]
    assert model.channels == [16, 24] and model.out_features == names


def test_stochastic_depth_rises_over_single_blocks():
    model = DaViT(config(drop_path_rate=0.5))
    rates = [one.rate for one in model.modules() if isinstance(one, _DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    torch.manual_seed(0)
    drop = _DropPath(0.25).train()
    out = drop(torch.ones(4000, 1))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3]) and abs(out.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(out), out)


def test_blocks_are_layers_of_addresses():
    torch.manual_seed(0)
    model = DaViTForImageClassification(config(num_labels=5)).eval()
    x, outputs = torch.randn(1, 3, 32, 32), HeadOutputs()
    with torch.no_grad(), probe(model, outputs):
        plain = model(x).logits
    assert len(outputs.values) == 6
    with torch.no_grad(), hw.steer(model, Ablate(heads="1.0", mode="zero")):
        assert not torch.allclose(model(x).logits, plain)
    assert torch.equal(model(x).logits, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sizes": (96, 192, 384)}, "must have one value for every stage"),
        ({"num_heads": (3, 6, 12, 25)}, r"num_heads\[3\] is 25, which does not divide 768 channels"),
        ({"window_size": 0}, "window_size is 0"),
        ({"variant": "swin"}, "variant is 'swin'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DaViTConfig(**change)


def test_images_that_do_not_fit_are_refused():
    model = DaViT(config())
    with pytest.raises(ValueError, match="images are 7 x 20 pixels; at least 8 x 8 are needed"):
        model(torch.zeros(1, 3, 7, 20))
    with pytest.raises(ValueError, match="have 1 channels, expected 3"):
        model(torch.zeros(1, 1, 32, 32))
    assert DaViTConfig().least_size == 32
    with pytest.raises(ValueError, match="no preset 'mini'"):
        DaViTConfig.preset("mini")
