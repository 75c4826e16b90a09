# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gaussian-adaptive-attention==0.1.5", "safetensors>=0.5", "numpy>=2.0"]
# ///
"""What the released Gaussian adaptive attention gives: axes, heads and Gaussians, a remainder, padding, a block.

usage: gaussian_adaptive.py OUT.safetensors
"""

import json
import sys
from importlib.metadata import version

import torch
from gaussian_adaptive_attention import GaussianBlock, MultiHeadGaussianAdaptiveAttention
from safetensors.torch import save_file

SEED = 0
# name -> shape of x, axis, heads, Gaussians, padding value
CASES = {
    "features": ((2, 7, 12), -1, 3, 2, None),
    "time": ((2, 13, 5), 1, 2, 3, None),  # 13 = 6 + 7
    "matrix": ((6, 9), 0, 1, 1, None),
    "four axes": ((2, 3, 16, 4), 2, 3, 5, None),
    "padded": ((2, 10, 4), 1, 1, 2, 0.0),
}


def main(out: str) -> None:
    torch.manual_seed(SEED)
    tensors = {}
    for dtype in (torch.float32, torch.float64):
        label = str(dtype).removeprefix("torch.")
        for name, (shape, axis, heads, gaussians, padding) in CASES.items():
            module = MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, padding)
            with torch.no_grad():
                for head in module.attention_heads:
                    head.mean_offsets.normal_(std=0.2)
                    head.c.copy_(torch.where(torch.rand(gaussians) < 0.5, -1.0, 1.0) * (1 + torch.rand(gaussians)))
            module.to(dtype)
            x = torch.randn(shape, dtype=dtype) * 2 + 1
            if padding is not None:
                x[1, 6:] = padding
            y, weights = module(x, return_attention_details=True)
            tensors |= {f"{label}/{name}/x": x, f"{label}/{name}/y": y.detach(), f"{label}/{name}/weights": weights}
            tensors |= {f"{label}/{name}/state/{key}": value for key, value in module.state_dict().items()}
    block = GaussianBlock([-1, 1], [2, 1], [2, 2], 2).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(1 + torch.rand(2) if name.endswith("c") else 0.2 * torch.randn(2))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    tensors |= {"block/x": x, "block/y": block(x).detach()}
    tensors |= {f"block/state/{key}": value for key, value in block.state_dict().items()}
    versions = {name: version(name) for name in ("torch", "gaussian-adaptive-attention")}
    metadata = {"versions": json.dumps(versions), "cases": json.dumps(CASES), "seed": str(SEED)}
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
