# /// script
# dependencies = ["torch==2.13.0", "torchvision==0.28.0", "timm==1.0.22", "safetensors>=0.5"]
# ///
"""timm's SqueezeExcite with random weights on a map of one column: state, input and output.

tests/attention/test_class_semantics.py gives the weights to the channel branch that reads the features themselves.
"""

import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file

# timm imports torchvision and uses none of it; beside a CPU build of torch its operators must be declared first.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.layers.squeeze_excite import SqueezeExcite  # noqa: E402


def main(path: str) -> None:
    torch.manual_seed(0)
    module = SqueezeExcite(16, rd_channels=4).eval()
    x = torch.randn(3, 16, 11, 1)
    with torch.no_grad():
        out = module(x)
    save_file({**module.state_dict(), "x": x, "out": out}, path, {"timm": version("timm"), "seed": "0"})


if __name__ == "__main__":
    main(sys.argv[1])
