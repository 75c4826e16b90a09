# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "einops", "agent-attention-pytorch==0.1.7"]
# ///
"""What the official Agent-Attention code and the package agent-attention-pytorch say about small random networks.

The official code is no package: it is cloned, at a fixed commit, from AGENT_ATTENTION_REPOSITORY (a URL or a folder;
GitHub by default). Its old timm is replaced by the few parts that it uses.

usage: agent_attention.py OUT.safetensors
"""

import importlib
import os
import subprocess
import sys
import tempfile
import types

import torch
from agent_attention_pytorch import AgentSelfAttention
from safetensors.torch import save_file
from torch import nn

SOURCE = os.environ.get("AGENT_ATTENTION_REPOSITORY", "https://github.com/LeapLabTHU/Agent-Attention")
COMMIT = "207ce3eb357b22ef8a15f8fa21cd1f14697bbaba"


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def official(folder):
    """Its DeiT file as a module."""
    subprocess.run(["git", "clone", "--quiet", SOURCE, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", COMMIT], check=True)
    parts = {
        "timm": {},
        "timm.data": dict.fromkeys(
            [f"IMAGENET_{kind}_{what}" for kind in ("DEFAULT", "INCEPTION") for what in ("MEAN", "STD")]
        ),
        "timm.models": {},
        "timm.models.helpers": dict.fromkeys(["build_model_with_cfg", "named_apply", "adapt_input_conv"]),
        "timm.models.layers": {
            "PatchEmbed": PatchEmbed,
            "Mlp": Mlp,
            "DropPath": nn.Identity,
            "trunc_normal_": nn.init.trunc_normal_,
            "lecun_normal_": None,
        },
        "timm.models.registry": {"register_model": lambda function: function},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(content, __path__=[])
        sys.modules[name] = module
    package = types.ModuleType("official")
    package.__path__ = [f"{folder}/agent_transformer/models"]
    sys.modules["official"] = package
    return importlib.import_module("official.agent_deit")


@torch.no_grad()
def spread(model):
    """Random weights that are not small, so that softmax has something to choose from."""
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def main(out):
    torch.manual_seed(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        code = official(folder)
        layer = code.AgentAttention(32, num_heads=4, qkv_bias=True, agent_num=9, window=6).eval()
        spread(layer)
        x = torch.randn(2, 37, 32)
        found |= {f"layer.{name}": value for name, value in layer.state_dict().items()}
        found |= {"layer_x": x, "layer_out": layer(x)}
        network = code.VisionTransformer(
            img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=32, depth=3, num_heads=4,
            agent_num=[4, 4, 4, 4], agent_layer=2,
        ).eval()  # fmt: skip
        spread(network)
        pixels = torch.randn(2, 1, 16, 16)
        found |= {f"network.{name}": value for name, value in network.state_dict().items()}
        found |= {"network_x": pixels, "network_out": network(pixels)}
    learned = AgentSelfAttention(32, num_agent_tokens=5, dim_head=8, heads=4, talking_heads=False, gate=False).eval()
    spread(learned)
    x = torch.randn(2, 11, 32)
    found |= {f"learned.{name}": value for name, value in learned.state_dict().items()}
    found |= {"learned_x": x, "learned_out": learned(x)}
    save_file({name: value.contiguous() for name, value in found.items()}, out)


main(sys.argv[1])
