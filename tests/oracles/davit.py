# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "safetensors>=0.5", "numpy>=2.0", "pillow>=11", "setuptools"]
# [tool.headwise]
# alone = ["timm==1.0.31", "torchvision==0.28.0"]
# ///
"""What timm's DaViT and transformers' Florence-2 vision backbone say about random images, with random weights.

torchvision is imported by timm and never used; on a CPU build of torch its operators must be declared first.

usage: davit.py OUT.safetensors
"""

import json
import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file

_schemas = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.models.davit import DaVit  # noqa: E402
from transformers import Florence2VisionConfig  # noqa: E402
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone  # noqa: E402

SEED = 0
SIZES = [(32, 32), (45, 38), (64, 41)]  # whole windows, and none of them
SHAPE = {"depths": (1, 2), "widths": (16, 24), "heads": (2, 3), "window": 3}


def randomise(model: torch.nn.Module) -> None:
    """Norms and biases too, so that nothing is hidden by a one or a zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def timm_model(v2: bool) -> torch.nn.Module:
    return DaVit(
        depths=SHAPE["depths"], embed_dims=SHAPE["widths"], num_heads=SHAPE["heads"], window_size=SHAPE["window"],
        num_classes=5, down_kernel_size=3 if v2 else 2, channel_attn_v2=v2,
    )  # fmt: skip


def florence() -> torch.nn.Module:
    config = Florence2VisionConfig(
        depths=SHAPE["depths"], embed_dim=SHAPE["widths"], num_heads=SHAPE["heads"], num_groups=SHAPE["heads"],
        window_size=SHAPE["window"], patch_size=(7, 3), patch_stride=(4, 2), patch_padding=(3, 1),
        patch_prenorm=(False, True),
    )  # fmt: skip
    return Florence2VisionBackbone(config)


def main(out: str) -> None:
    tensors = {}
    for name, make in {
        "timm": lambda: timm_model(False),
        "timm-v2": lambda: timm_model(True),
        "florence2": florence,
    }.items():
        torch.manual_seed(SEED)
        model = make().eval()
        randomise(model)
        tensors |= {f"{name}.weights.{key}": value.clone() for key, value in model.state_dict().items()}
        for number, size in enumerate(SIZES):
            x = torch.randn(2, 3, *size)
            with torch.no_grad():
                found = model(x)
                tensors[f"{name}.{number}.x"] = x
                if name == "florence2":
                    tensors[f"{name}.{number}.map"] = found.last_hidden_state
                else:
                    tensors[f"{name}.{number}.logits"] = found
                    tensors[f"{name}.{number}.map"] = model.forward_features(x)
    versions = {name: version(name) for name in ("torch", "timm", "transformers")}
    metadata = {"versions": json.dumps(versions), "shape": json.dumps(SHAPE), "seed": str(SEED)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
