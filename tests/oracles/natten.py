# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "safetensors>=0.5", "numpy>=2.0", "setuptools", "wheel"]
# [tool.headwise]
# alone = ["natten==0.21.7"]
# ///
"""What NATTEN says about random inputs: windows of every kind on small grids, its module, and extra keys.

NATTEN without its CUDA library runs on the CPU through its Flex backend, in eager mode.

usage: natten.py OUT.safetensors
"""

import json
import sys
from importlib.metadata import version

import natten
import torch
from safetensors.torch import save_file

SEED, HEADS, SIZE, BATCH = 0, 2, 8, 2

# grid, kernel, stride, dilation, causal
CASES = {
    "1d": [(13,), (5,), (1,), (1,), (False,)],
    "1d-even": [(14,), (4,), (1,), (1,), (False,)],
    "1d-causal": [(17,), (6,), (1,), (2,), (True,)],
    "1d-strided": [(19,), (7,), (4,), (1,), (False,)],
    "1d-uneven-dilation": [(23,), (4,), (2,), (5,), (False,)],
    "1d-strided-causal": [(21,), (5,), (3,), (1,), (True,)],
    "2d": [(9, 11), (5, 3), (1, 1), (1, 1), (False, False)],
    "2d-dilated": [(11, 13), (3, 4), (1, 1), (3, 2), (False, False)],
    "2d-rows-causal": [(8, 9), (3, 4), (1, 2), (2, 1), (True, False)],
    "2d-strided": [(12, 10), (6, 5), (3, 5), (1, 2), (False, False)],
    "2d-causal": [(10, 7), (4, 3), (2, 1), (1, 2), (True, True)],
    "3d": [(5, 6, 4), (3, 4, 2), (1, 1, 1), (1, 1, 1), (False, False, False)],
    "3d-mixed": [(6, 5, 7), (3, 2, 3), (2, 1, 1), (2, 1, 2), (True, False, False)],
}
OPERATORS = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
MODULES = {
    "module-1d": (natten.NeighborhoodAttention1D, (15,), {"kernel_size": 5, "dilation": 2, "is_causal": True}),
    "module-2d": (natten.NeighborhoodAttention2D, (8, 9), {"kernel_size": (3, 5), "stride": (1, 2)}),
}


def main(out: str) -> None:
    torch.manual_seed(SEED)
    tensors, cases = {}, {}
    for name, (grid, kernel, stride, dilation, causal) in CASES.items():
        q, k, v = (torch.randn(BATCH, *grid, HEADS, SIZE) for _ in range(3))
        found = OPERATORS[len(grid)](
            q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, is_causal=causal, backend="flex-fna"
        )
        tensors |= {f"{name}.{key}": x for key, x in {"q": q, "k": k, "v": v, "out": found}.items()}
        cases[name] = {"kernel": kernel, "stride": stride, "dilation": dilation, "causal": causal}
    for name, (make, grid, options) in MODULES.items():
        layer = make(HEADS * SIZE, HEADS, **options).eval()
        x = torch.randn(BATCH, *grid, HEADS * SIZE)
        with torch.no_grad():
            tensors |= {f"{name}.x": x, f"{name}.out": layer(x)}
        tensors |= {f"{name}.weights.{key}": value.clone() for key, value in layer.state_dict().items()}
        cases[name] = options
    versions = {name: version(name) for name in ("torch", "natten")}
    metadata = {"versions": json.dumps(versions), "cases": json.dumps(cases), "seed": str(SEED)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
