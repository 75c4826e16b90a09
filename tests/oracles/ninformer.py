# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "einops"]
# ///
"""What the official NiNformer block says with small random weights.

The official code is no package: it is cloned, at a fixed commit, from NINFORMER_REPOSITORY (a URL or a folder; GitHub
by default). Its classifier stands in a script that trains on import; the three lines around the blocks are written out.

usage: ninformer.py OUT.safetensors
"""

import importlib.util
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from torch import nn

SOURCE = os.environ.get("NINFORMER_REPOSITORY", "https://github.com/Abdullah-88/NiNformer")
COMMIT = "0ec85d46a82ea9472fdd28dde0b70dc0ca62a91a"


@torch.no_grad()
def main(out):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", SOURCE, folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "--quiet", COMMIT], check=True)
        spec = importlib.util.spec_from_file_location("official_ninformer", f"{folder}/ninformer.py")
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
    network = code.NiNformer(16, 24, 9, 2, 0.5).eval()
    network.patcher, network.classifier = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, 5)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.randn(3, 1, 12, 12)
    tokens = network.patcher(pixels).permute(0, 2, 3, 1).reshape(3, 9, 16)
    found = {f"state.{name}": value.contiguous() for name, value in network.state_dict().items()}
    found |= {"pixels": pixels, "gate": network.model[0].mgu(tokens), "mix": network.model[0].mgu.Mixer(tokens)}
    found |= {"tokens": tokens, "logits": network.classifier(network(tokens).mean(dim=1))}
    save_file({name: value.contiguous() for name, value in found.items()}, out)


main(sys.argv[1])
