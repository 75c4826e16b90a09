"""Prefill of one prompt with 576 image tokens: LLaVA of transformers against NAAViT and SAISA of the same sizes.

Random weights, a Llama of 4 layers, 512 wide, image features given (the vision tower is the same for all). The share of
operations that the closed formula leaves stands in the name of each variant; "next turn" has the image's keys at hand,
and "whole rows" is the reference, which computes image rows to throw them away.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import Benchmark, Variant, setting
from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
from headwise.models.saisa_costs import prefill_flops

IMAGE, PICTURE = 1, 576
TEXTS = (64, 256)
ARMS = {"LLaVA": "embedding", "NAAViT": "naavit", "SAISA": "saisa"}


def config(alignment: str, implementation: str = "auto") -> SaisaConfig:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 336, "patch_size": 14, "projection_dim": 256,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    }  # fmt: skip
    return SaisaConfig(
        alignment, implementation, vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_seq_length=PICTURE, vision_feature_layer=-1,
    )  # fmt: skip


@cache
def network(alignment: str, implementation: str = "auto") -> Any:
    torch.manual_seed(0)
    model: Any = SaisaForConditionalGeneration(config(alignment, implementation)).eval()
    return model.to(device=setting.device, dtype=getattr(torch, setting.dtype))


@cache
def prompt(text: int) -> Tensor:
    words = torch.randint(4, 128, (1, text), generator=torch.Generator().manual_seed(text))
    return torch.cat([words[:, :8], torch.full((1, PICTURE), IMAGE), words[:, 8:]], 1).to(setting.device)


@torch.no_grad()
def prefill(alignment: str, text: int, implementation: str = "auto", *, turn: int = 1) -> Callable[[], Any]:
    """One prefill from the features of the vision tower. turn: of the first one the image's keys are not made yet."""
    model, ids = network(alignment, implementation), prompt(text)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(setting.device, getattr(torch, setting.dtype))
    images = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    if turn > 1:
        images = model.encode_images(pixels)
    elif alignment != "saisa":  # the projector is part of a prefill's cost, as it is for SAISA
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

        @torch.no_grad()
        def projected() -> Any:
            images.pooler_output = list(model.model.multi_modal_projector(hidden))
            return model(ids, mm_encoder_outputs={"image": images}, logits_to_keep=1).logits

        return projected

    @torch.no_grad()
    def run() -> Any:
        return model(ids, mm_encoder_outputs={"image": images}, logits_to_keep=1).logits

    return run


def variants(text: int) -> list[Variant]:
    whole = prefill_flops(config("embedding"), text, PICTURE)
    left = {name: prefill_flops(config(alignment), text, PICTURE) / whole for name, alignment in ARMS.items()}
    made = [
        Variant(f"{name}, {left[name]:.0%} of the operations", partial(prefill, alignment, text))
        for name, alignment in ARMS.items()
    ]
    made.append(Variant("SAISA, next turn", partial(prefill, "saisa", text, turn=2)))
    made.append(Variant("SAISA, whole rows", partial(prefill, "saisa", text, "reference")))
    return made


def check() -> None:
    """Text rows alone, whole rows and keys at hand give the same logits."""
    bound = 1e-4 if setting.dtype == "float32" else 5e-2
    alone = prefill("saisa", 64)()
    for other in (prefill("saisa", 64, "reference"), prefill("saisa", 64, turn=2)):
        torch.testing.assert_close(other(), alone, rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    inputs = {f"{PICTURE} image, {text} text tokens": partial(variants, text) for text in TEXTS}
    return Benchmark("saisa", inputs, check, rounds=7)
