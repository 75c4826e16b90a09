# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "timm==1.0.31", "torchvision==0.28.0"]
# ///
"""What timm says about efficient local attention: its own module of that name, and the sizes of ResNet-50 with it.

usage: timm_ela.py OUT.safetensors
"""

import json
import sys
from unittest import mock

import torch
from safetensors.torch import save_file

# torchvision's compiled operators are built for another torch; timm needs none of them.
with mock.patch("torch.library.register_fake", lambda name: lambda function: function):
    import timm
    from timm.layers import create_attn

SEED = 0


def main(out: str) -> None:
    torch.manual_seed(SEED)
    tensors = {}
    for dtype in (torch.float32, torch.float64):
        module = create_attn("ela", 32).to(dtype)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "weight" in name else 0.2))
        x = torch.randn(2, 32, 9, 13, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            tensors |= {f"{label}.x": x, f"{label}.y": module(x)}
        tensors |= {f"{label}.{name}": parameter.detach() for name, parameter in module.state_dict().items()}
    sizes = {}
    for name in (None, "ela", "coord", "se", "eca"):
        model = timm.create_model("resnet50", block_args={"attn_layer": name} if name else {})
        sizes[name or "plain"] = sum(parameter.numel() for parameter in model.parameters())
    metadata = {
        "seed": str(SEED), "timm": timm.__version__, "torch": torch.__version__, "resnet50": json.dumps(sizes),
    }  # fmt: skip
    save_file({name: value.contiguous() for name, value in tensors.items()}, out, metadata=metadata)


if __name__ == "__main__":
    main(sys.argv[1])
