# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy", "safetensors"]
# ///
"""What the official ACT code makes of random causal maps, in a prefill; and what it does with one row of a cache.

The official code is no package: it is cloned, at a fixed commit, from ATTENTION_CALIBRATION_REPOSITORY (a URL or a
folder; GitHub by default). The parts of transformers that it imports and does not use here are left empty.

usage: attention_calibration.py OUT.safetensors
"""

import importlib
import os
import subprocess
import sys
import tempfile
import types

import torch
from safetensors.torch import save_file

SOURCE = os.environ.get("ATTENTION_CALIBRATION_REPOSITORY", "https://github.com/GATECH-EIC/ACT")
COMMIT = "a267af7e70cd277090acbd01d87bb497921d5025"
LENGTH, HEADS, LAYER = 48, 32, 2
BETA, THRESHOLD = 0.4, 0.1


def official(folder):
    """Its file with the edited attention, and its head sets."""
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", SOURCE, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", COMMIT, "--", "models"], check=True)
    for name in ("transformers", "transformers.models", "transformers.models.llama"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    llama = types.ModuleType("transformers.models.llama.modeling_llama")
    llama.__dict__.update(dict.fromkeys(["apply_rotary_pos_emb", "repeat_kv", "rotate_half"]))
    sys.modules[llama.__name__] = llama
    os.environ |= {"BETA": str(BETA), "THRES": str(THRESHOLD), "HEAD_NUM": "0"}
    package = types.ModuleType("official")
    package.__path__ = [f"{folder}/models"]
    sys.modules["official"] = package
    return importlib.import_module("official.llama_modelling_aug")


def main(out):
    torch.manual_seed(0)
    scores = torch.randn(1, HEADS, LENGTH, LENGTH)
    scores[..., 0] += 3  # the first token is above the threshold in every head
    scores[..., 7] += 2.5 * (torch.rand(1, HEADS, 1) > 0.5)
    scores[..., 30] += 2.5 * (torch.rand(1, HEADS, 1) > 0.5)
    maps = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(-1)
    with tempfile.TemporaryDirectory() as folder:
        code = official(folder)
        heads = torch.tensor(code.aug_indices_comb_classification[0])
        found = code.atten_process_eval(maps.clone(), index=LAYER)
        row = code.atten_process_eval(maps[:, :, -1:].clone(), index=LAYER)
    changed = [head for head in range(HEADS) if not torch.equal(found[:, head], maps[:, head])]
    if not changed or not set(changed) <= set(heads.tolist()):
        raise RuntimeError(f"it changed heads {changed}; its set names {heads.tolist()}")
    kept = {"maps": maps, "calibrated": found, "one_row": row}
    save_file({"heads": heads} | {name: x[:, heads].contiguous() for name, x in kept.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
