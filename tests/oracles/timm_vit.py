# /// script
# dependencies = ["torch==2.13.0", "torchvision==0.28.0", "timm==1.0.22", "safetensors>=0.5"]
# ///
"""A small vision transformer of timm with random weights: its state, images and class scores.

tests/models/test_dual_cross_attention.py loads the state into a network with the same parts, which must give the same
scores when DualCrossAttention runs it block by block.
"""

import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file

# timm imports torchvision and uses none of it; beside a CPU build of torch its operators must be declared first.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402


def main(path: str) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    model = VisionTransformer(**sizes, num_classes=5, qk_norm=True, init_values=0.5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        images = torch.randn(3, 3, 16, 16)
        scores = model(images)
    tensors = {f"state.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors | {"images": images, "scores": scores}, path, {"timm": version("timm"), "seed": "0"})


if __name__ == "__main__":
    main(sys.argv[1])
