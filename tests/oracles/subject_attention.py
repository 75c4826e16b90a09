# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors", "diffusers==0.42.1"]
# ///
"""What the official self-attention of IR-Diffusion makes of random tokens: isolated, reading references, repositioned.

The official code is no package: it is cloned, at a fixed commit, from SUBJECT_ATTENTION_REPOSITORY (a URL or a folder;
GitHub by default). The processor that it inherits from finds masks and counts calls; both are given here by hand.

usage: subject_attention.py OUT.safetensors
"""

import importlib
import os
import subprocess
import sys
import tempfile
import types

import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file

SOURCE = os.environ.get("SUBJECT_ATTENTION_REPOSITORY", "https://github.com/hehuiguo/DreamStory")
COMMIT = "91e1a4b2ae138e60e9b7d8f4a7178ed7b19eb9f9"
FOLDER = "src/DreamStory/attention_processor"
NAME = "DreamStoryScaledAttnProcessor"
ROWS, COLUMNS, WIDTH, HEADS = 6, 8, 16, 2
# Top, bottom, left and right of two subjects in the target, and in their references; all of other sizes.
TARGET, REFERENCE = ((0, 2, 0, 3), (3, 5, 4, 6)), ((2, 5, 3, 7), (0, 1, 1, 5))
CASES = {  # reposition, isolation, what is added to the logits of references, whether they are read
    "isolated": (True, True, 0.0, False),
    "read": (False, True, 0.0, True),
    "repositioned": (True, True, 0.0, True),
    "boosted": (True, False, 0.7, True),
}


def official(folder):
    """Its processor, without the one that it inherits from."""
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", SOURCE, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", COMMIT, "--", f"{FOLDER}/{NAME}.py"], check=True)
    package, parent = types.ModuleType("official"), types.ModuleType("official.DreamStoryAttnProcessor")
    package.__path__ = [f"{folder}/{FOLDER}"]
    parent.DreamStoryAttnProcessor = object
    sys.modules |= {package.__name__: package, parent.__name__: parent}
    return getattr(importlib.import_module(f"official.{NAME}"), NAME)


def boxes(corners):
    masks = torch.zeros(len(corners), ROWS, COLUMNS)
    for mask, (top, bottom, left, right) in zip(masks, corners, strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    masks[0, corners[0][0], corners[0][2]] = 0  # no whole box
    return masks.flatten(1)


def main(out):
    torch.manual_seed(0)
    attention = Attention(WIDTH, heads=HEADS, dim_head=WIDTH // HEADS)
    for parameter in attention.parameters():
        parameter.data.normal_(std=0.5)
    states = torch.randn(6, ROWS * COLUMNS, WIDTH)
    target, reference = boxes(TARGET), boxes(REFERENCE)
    kept = {"states": states, "target": target.bool(), "reference": reference.bool()}
    kept |= {f"weight/{name}": x for name, x in attention.state_dict().items()}
    parts = attention.to_q, attention.to_k, attention.to_v
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cls = official(folder)
        q, k, v = (attention.head_to_batch_dim(part(states)) for part in parts)
        for case, (reposition, isolate, boost, read) in CASES.items():
            processor = cls.__new__(cls)
            spatial = [mask[:, None] for mask in target]
            processor.__dict__ |= {
                "subj_num": 2, "latents_shape": (ROWS, COLUMNS), "cur_step": 0, "step_idx_list": [0] if read else [],
                "cur_att_layer": 0, "self_attn_layer_idx_list": [0], "is_spatial_self_attn": True, "is_DIFT": False,
                "spatial_mask_dict": {f"original_{ROWS}x{COLUMNS}": spatial}, "is_rescale_self_attn": reposition,
                "is_isolate_sa": isolate, "ref_sa_lambda": boost,
            }  # fmt: skip
            found = processor.self_attention(
                attention, states, states, attention.get_attention_scores(q, k), q, k, v,
                list(reference), spatial, list(reference), spatial,
            )  # fmt: skip
            kept[f"out/{case}"] = found
    save_file({name: x.contiguous() for name, x in kept.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
