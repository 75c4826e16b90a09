"""Efficient local attention inside networks: where it goes, what it adds, and what is refused.

timm and torchvision are not installed here: blocks with the names of theirs stand for them.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ForSemanticSegmentation,
    ResNetConfig,
    ResNetForImageClassification,
)

from headwise.attention import ELA
from headwise.errors import UnsupportedModel
from headwise.models import add_attention
from headwise.models.convert_efficient_local import CONVERTERS

FIXTURE = Path(__file__).parents[1] / "fixtures" / "timm_ela.safetensors"


THOUSAND: dict[str, Any] = {"num_labels": 1000}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def modules(model: nn.Module) -> list[ELA]:
    return [one for one in model.modules() if isinstance(one, ELA)]


def resnet(layer_type: str = "bottleneck", **sizes) -> ResNetForImageClassification:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "num_labels": 3} | sizes
    return ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **small)).eval()


@pytest.mark.parametrize(("version", "added"), [("t", 105_728), ("b", 135_936), ("s", 634_368), ("l", 876_032)])
def test_resnet50_grows_as_the_paper_table_says(version, added):
    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(**THOUSAND))
    assert count(model) == 25_557_032
    assert count(add_attention(model, f"ela-{version}")) == 25_557_032 + added
    assert len(modules(model)) == 16


def test_resnet18_and_what_timm_counts():
    with torch.device("meta"):
        config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
        model = ResNetForImageClassification(config)
    before = count(model)
    assert count(add_attention(model)) - before == 17_280
    with safe_open(FIXTURE, "pt") as peer:
        sizes = json.loads(peer.metadata()["resnet50"])
    assert sizes["plain"] == 25_557_032 and sizes["se"] - sizes["plain"] == 2_530_992
    assert sizes["coord"] - sizes["plain"] == 2_526_432 and sizes["ela"] == 25_828_904


@pytest.mark.parametrize("layer_type", ["bottleneck", "basic"])
def test_it_stands_on_the_residual_branch(layer_type):
    """With gates of zero every block is its shortcut alone."""
    model, x = resnet(layer_type), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    add_attention(model)
    for one in modules(model):
        nn.init.zeros_(one.norm.weight)
        nn.init.constant_(one.norm.bias, -1e4)
    for block in plain.modules():
        if hasattr(block, "shortcut"):
            last = block.layer[-1].normalization  # type: ignore[union-attr, index]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    torch.testing.assert_close(model(x).logits, plain(x).logits)


def test_open_gates_keep_a_trained_network_nearly_as_it_was():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    plain = model(x).logits
    near = add_attention(copy.deepcopy(model), identity_init=True)(x).logits
    far = add_attention(copy.deepcopy(model))(x).logits
    assert (near - plain).norm() < 0.1 * plain.norm() < (far - plain).norm()


def test_mobilenet_and_deeplab():
    for cls in (MobileNetV2ForImageClassification, MobileNetV2ForSemanticSegmentation):
        torch.manual_seed(0)
        model = cls(MobileNetV2Config()).eval()
        x = torch.randn(1, 3, 64, 64)
        shape, before = model(x).logits.shape, count(model)
        add_attention(model, "ela-b")
        # As counted in timm's and torchvision's MobileNetV2.
        assert len(modules(model)) == 17 and count(model) - before == 64_224 and model(x).logits.shape == shape
        with pytest.raises(ValueError, match="norm_groups=16"):
            add_attention(cls(MobileNetV2Config()), "ela-t")


def test_nothing_changes_where_one_block_is_refused():
    model = resnet(hidden_sizes=[32, 40])
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="norm_groups=8"):
        add_attention(model)
    assert set(model.state_dict()) == names
    assert [one.norm_groups for one in modules(add_attention(model, fit_groups=True))] == [16, 8, 8]


def test_chosen_blocks_and_named_modules():
    model = add_attention(resnet(), "ELA-S", layers=[0, 2])
    assert [one.channels for one in modules(model)] == [32, 64] and modules(model)[0].version == "S"
    neck = add_attention(resnet(), where={"resnet.embedder": 16})
    assert neck(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3) and modules(neck)[0].channels == 16
    with pytest.raises(ValueError, match="there are blocks 0 to 2"):
        add_attention(resnet(), layers=[3])
    with pytest.raises(ValueError, match=r"where names 'neck'"):
        add_attention(resnet(), where={"neck": 16})
    with pytest.raises(ValueError, match="where is 'stage'"):
        add_attention(resnet(), where="stage")


def test_twice_and_elsewhere_are_refused():
    with pytest.raises(ValueError, match="has this attention already"):
        add_attention(add_attention(resnet()))
    with pytest.raises(ValueError, match="to is 'se'; choose ela-t"):
        add_attention(resnet(), "se")
    with pytest.raises(UnsupportedModel, match="no residual blocks"):
        add_attention(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_device_dtype_and_mode_are_the_networks():
    model = add_attention(resnet().double().train())
    assert all(one.conv.weight.dtype == torch.float64 and one.training for one in modules(model))


def test_converters():
    assert set(CONVERTERS) == {"ela-t", "ela-b", "ela-s", "ela-l"}
    model = CONVERTERS["ela-l"](resnet(), layers=[1], shared=False)
    assert [(one.version, one.shared) for one in modules(model)] == [("L", False)]


class Torchvision(nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, bottleneck: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32)
        if bottleneck:
            self.conv3, self.bn3 = nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64)
        self.downsample = None


class Timm(Torchvision):
    def __init__(self, bottleneck: bool):
        super().__init__(bottleneck)
        self.se = None


class Inverted(nn.Module):
    """A block of torchvision's MobileNets, with squeeze-and-excitation or without."""

    def __init__(self, squeeze: bool):
        super().__init__()
        self.use_res_connect = True
        depthwise = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.BatchNorm2d(48))
        gate = nn.Module()
        gate.avgpool, gate.fc1, gate.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 4, 1), nn.Conv2d(4, 48, 1)
        project = nn.Conv2d(48, 8, 1)
        expand = nn.Sequential(nn.Conv2d(8, 48, 1))
        self.conv = nn.Sequential(expand, depthwise, *([gate] if squeeze else []), project)


class TimmInverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_dw, self.se = nn.Conv2d(64, 64, 3, groups=64), nn.Identity()


def test_blocks_as_torchvision_and_timm_name_them():
    model = add_attention(nn.ModuleList([Torchvision(False), Torchvision(True), Timm(True), Timm(False)]))
    basic, bottleneck, timm, timm_basic = model
    assert isinstance(basic.bn2[1], ELA) and isinstance(bottleneck.bn3[1], ELA) and bottleneck.bn3[1].channels == 64
    assert isinstance(timm.se, ELA) and timm.se.channels == 64 and timm_basic.se.channels == 32
    assert isinstance(timm.bn3, nn.BatchNorm2d)
    mobile = add_attention(nn.ModuleList([Inverted(False), Inverted(True), TimmInverted()]))
    plain, squeezed, inverted = mobile
    assert isinstance(plain.conv[1][1], ELA) and plain.conv[1][1].channels == 48
    assert isinstance(squeezed.conv[2], ELA) and len(squeezed.conv) == 4
    assert inverted.se.channels == 64
