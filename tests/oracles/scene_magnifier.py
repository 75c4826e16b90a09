# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy<2", "safetensors", "transformers==4.40.2"]
# ///
"""What two attention layers of the official LSceneLLM make of random tokens: one that chooses, one that looks closer.

The official code is no package: it is cloned, at a fixed commit, from SCENE_MAGNIFIER_REPOSITORY (a URL or a folder;
GitHub by default). Its file of the language model is used as it is.

usage: scene_magnifier.py OUT.safetensors
"""

import importlib.util
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SOURCE = os.environ.get("SCENE_MAGNIFIER_REPOSITORY", "https://github.com/Hoyyyaard/LSceneLLM")
COMMIT = "b85581b29f491672856c10536d434d82403d0b0a"
REGIONS, EACH, BEFORE, TEXT = 12, 4, 3, 6  # coarse tokens, fine ones of each, tokens before and behind
WIDTH, HEADS, BATCH = 32, 4, 2  # it does not know grouped keys
THRESHOLD = 96  # of 255


def official(folder):
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", SOURCE, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", COMMIT, "--", "models/modeling_llama.py"], check=True)
    spec = importlib.util.spec_from_file_location("official", f"{folder}/models/modeling_llama.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(out):
    os.environ["RANK"] = "1"  # it prints from rank 0
    torch.manual_seed(0)
    length, start = BEFORE + REGIONS + TEXT, BEFORE + REGIONS
    config = LlamaConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    names = {
        "FLEX": True, "START_FLEX_LAYER": 0, "VISION_TOKEN_NUM": REGIONS, "DENSE_TOKEN_NUM": EACH, "FLEX_WARM_UP": -1,
        "DENSE_TOKEN_SELECT_THRESHOLD": THRESHOLD, "scene_token_start_index": BEFORE,
        "start_learnable_seq_id": [torch.tensor(start)] * BATCH,
        "end_learnable_seq_id": [torch.tensor(length - 1)] * BATCH,
    }  # fmt: skip
    config.__dict__.update(names)
    states, fine = torch.randn(2, BATCH, length, WIDTH), torch.randn(BATCH, REGIONS, EACH, WIDTH)
    mask = torch.zeros(BATCH, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    kept = {"states": states, "fine": fine.flatten(1, 2)}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        code = official(folder)
        chosen = []
        for layer in (0, 1):
            attention = code.LlamaAttention(config, layer).eval()
            for parameter in attention.parameters():
                parameter.normal_(std=0.4)
            attention.hd_features = fine
            found, _, _, select = attention(
                states[layer],
                mask.clamp_min(torch.finfo(torch.float32).min),
                torch.arange(length)[None].expand(BATCH, -1),
                last_select_mask_list=chosen,
            )
            if layer == 0:
                chosen = select
            kept |= {f"{layer}.{name}": x for name, x in attention.state_dict().items() if x.ndim == 2}
            kept[f"out.{layer}"] = found
    kept["select"] = torch.stack(chosen)
    share = kept["select"][:, start:].float().mean()
    if not 0.05 < share < 0.95:
        raise RuntimeError(f"a share of {share:.2f} is chosen, which tells little")
    save_file({name: x.contiguous() for name, x in kept.items()}, out)


if __name__ == "__main__":
    main(sys.argv[1])
