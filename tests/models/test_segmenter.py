"""Segmenters: every backbone by name, what the head does with its maps, weights of other checkpoints."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DinatConfig,
    DinatForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinBackbone,
    SwinConfig,
)

from headwise.attention import EfficientLocalAttention
from headwise.models import (
    BACKBONES,
    AgentDeiT,
    DaViTForImageClassification,
    Segmenter,
    SegmenterConfig,
    provide_natten,
)
from headwise.models.agent_deit import AgentDeiTConfig
from headwise.models.davit import DaViTConfig

PYRAMID = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "drop_path_rate": 0.0}
TOKENS = {"image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 16, "num_hidden_layers": 1}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
SIZES = {
    "davit": {"depths": [1, 1], "hidden_sizes": [16, 32], "num_heads": [2, 4], "window_size": 3},
    "neighborhood": {**PYRAMID, "kernel_size": 3, "dilations": [[1], [1, 1]]},
    "agent": {**TOKENS, "num_attention_heads": 2, "num_agents": 4},
    "ela-resnet": RESNET,
    "small-vit": {**TOKENS, "num_attention_heads": 2, "attention": "ReluAttention"},
    "swin": {**PYRAMID, "window_size": 2, "image_size": 16},
    "resnet": RESNET,
}


# transformers normalises the last map of Swin, and its backbone does not look at that.
UNUSED = {"swin": {"backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"}}


def without_gradient(model) -> set[str]:
    return {key for key, value in model.named_parameters() if value.grad is None}


def made(name: str) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(SegmenterConfig(name, SIZES[name], head_width=8, num_labels=3)).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_a_class_for_every_pixel(name, tmp_path):
    model, images = made(name), torch.randn(2, 3, 16, 16)
    maps = model.maps(images)
    assert [one.shape[2:] for one in maps] == [(4, 4), (2, 2)][: len(maps)]
    assert len(maps) == (1 if name in ("agent", "small-vit") else 2)
    labels = torch.randint(0, 3, (2, 16, 16))
    labels[:, :4] = 255
    out = model(images, labels=labels)
    assert out.logits.shape == (2, 3, 16, 16)
    logs = out.logits.log_softmax(1).permute(0, 2, 3, 1)[labels != 255]
    torch.testing.assert_close(out.loss, -logs.gather(1, labels[labels != 255][:, None]).mean())
    out.loss.backward()
    assert without_gradient(model) == UNUSED.get(name, set())
    model.save_pretrained(tmp_path)
    again = Segmenter.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_maps_meet_at_the_finest_resolution():
    """A change under one cell of the coarse map reaches the pixels near it, and the coarse map is upsampled."""
    model = made("davit")
    seen = []
    model.mix.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(1, 3, 24, 16)
    logits = model(images).logits
    assert logits.shape == (1, 3, 24, 16) and seen[0].shape == (1, 8, 6, 4)
    fine, coarse = model.maps(images)
    up = nn.functional.interpolate(model.laterals[1](coarse), (6, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], model.laterals[0](fine) + up)


def test_gates_are_in_every_block_of_the_converted_resnet():
    gates = [part for part in made("ela-resnet").modules() if isinstance(part, EfficientLocalAttention)]
    assert [gate.channels for gate in gates] == [16, 32]
    assert not any(isinstance(part, EfficientLocalAttention) for part in made("resnet").modules())
    model = Segmenter(SegmenterConfig("ela-resnet", {**RESNET, "ela": "ela-t"}, num_labels=3))
    assert next(p for p in model.modules() if isinstance(p, EfficientLocalAttention)).version == "T"


def swin(sizes: Any) -> Any:
    sizes = {**sizes, "out_features": ["stage1", "stage2"]}
    return SwinBackbone(SwinConfig(**sizes)).eval()


def checkpoints(name: str) -> Any:
    """A classifier (or a backbone) with a backbone's weights, and the same network's maps."""
    if name == "davit":
        model = DaViTForImageClassification(DaViTConfig(**SIZES["davit"], num_labels=5)).eval()
        return model, lambda x: [one.permute(0, 3, 1, 2) for one in model.forward_maps(x)]
    if name == "agent":
        model = AgentDeiT(AgentDeiTConfig(**SIZES["agent"], num_labels=5, distilled=True)).eval()
        return model, lambda x: [model.forward_features(x)[:, 2:].mT.unflatten(2, (4, 4))]
    if name == "swin":
        model = swin(SIZES["swin"])
        return model, lambda x: list(model(x).feature_maps)
    if name == "neighborhood":
        with provide_natten():
            model = DinatForImageClassification(DinatConfig(**SIZES[name])).eval()
        return model, None
    model = ResNetForImageClassification(ResNetConfig(**RESNET)).eval()
    return model, lambda x: list(model.resnet(x, output_hidden_states=True).hidden_states[1:])


@pytest.mark.parametrize("name", ["davit", "agent", "swin", "neighborhood", "resnet", "ela-resnet"])
def test_a_trained_backbone_keeps_its_weights(name, tmp_path):
    torch.manual_seed(0)
    trained, maps = checkpoints(name)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model: Any = Segmenter.from_backbone(name, str(tmp_path), id2label={0: "a", 1: "b"}, head_width=8).eval()
    assert model.config.num_labels == 2 and model.config.id2label[1] == "b"
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        found = model.maps(images)
        if name == "neighborhood":
            weights = model.backbone.encoder.state_dict()
            assert all(torch.equal(weights[key], value) for key, value in trained.dinat.encoder.state_dict().items())
        elif name == "ela-resnet":  # gates near 1 at the start
            assert (found[0] - maps(images)[0]).norm() < 0.1 * maps(images)[0].norm()
        else:
            torch.testing.assert_close(found, maps(images))
    again = Segmenter(model.config).backbone.state_dict()
    assert {key: value.shape for key, value in again.items()} == {
        key: value.shape for key, value in model.backbone.state_dict().items()
    }


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="backbone is 'vgg'; choose davit, neighborhood"):
        SegmenterConfig("vgg")
    with pytest.raises(ValueError, match="backbone is 'vgg'"):
        Segmenter.from_backbone("vgg", "x", id2label={0: "a"})
    with pytest.raises(ValueError, match=r"expected \(3, 16, 16\)"):
        made("small-vit")(torch.zeros(1, 3, 20, 16))
