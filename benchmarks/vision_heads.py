"""Vision-aware head reinforcement: reading a prompt with a picture and writing after it, beside plain and contrastive.

One LLaVA with random weights, 576 image tokens (as many as LLaVA-1.5 has) and 41 words. VHR reads the words a second
and third time without the picture, layer by layer inside the forward that reads the prompt, and multiplies the heads'
outputs from then on; two forwards that are compared cost the prompt twice, contrastive decoding every token twice.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks import Benchmark, Variant, setting
from headwise.attend.edits import ScaleHeads
from headwise.heads.vision import vision_divergence
from headwise.hf.images import image_positions, without
from headwise.hf.session import steer
from headwise.steering.vision_head_reinforcement import VisionAwareHeadReinforcement

PATCHES, WORDS, WRITTEN = 576, 40, 32


@cache
def model() -> Any:
    """14 million parameters in eight layers of eight heads; a small CLIP tower before them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=192,
            patch_size=8, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=256, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        image_token_index=3, image_seq_length=PATCHES, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    made: Any = LlavaForConditionalGeneration(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


@cache
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(8, 256, (1, WORDS), generator=generator)
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, PATCHES), 3), words], 1)
    pixels = torch.randn(1, 3, 192, 192, generator=generator).to(getattr(torch, setting.dtype))
    return {"input_ids": ids.to(setting.device), "pixel_values": pixels.to(setting.device)}


def read(*edits: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), steer(model(), *edits):
            return model()(**inputs(), logits_to_keep=1).logits

    return run


def compare() -> Any:
    """The choice of heads from two forwards of its own, then the prompt."""
    vision_divergence(model(), inputs(), together=False).chosen()
    return read(ScaleHeads(scale=2.0))()


def write(*edits: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), steer(model(), *edits):
            return model().generate(**inputs(), max_new_tokens=WRITTEN, do_sample=False)

    return run


def contrast() -> Any:
    twin = without(inputs(), image_positions(model(), inputs()), model=model())
    with torch.no_grad():
        for given in (inputs(), twin):
            model().generate(**given, max_new_tokens=WRITTEN, do_sample=False)


def check() -> None:
    """Reinforcing is scaling the heads that were chosen."""
    edit = VisionAwareHeadReinforcement(2.0)
    found = read(edit)()
    assert edit.chosen is not None
    expected = read(ScaleHeads(scale=torch.where(edit.chosen, 2.0, 1.0)))()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def benchmark() -> Benchmark:
    def reading() -> list[Variant]:
        return [
            Variant("plain", lambda: read()),
            Variant("one factor on all heads", lambda: read(ScaleHeads(scale=2.0))),
            Variant("vhr", lambda: read(VisionAwareHeadReinforcement(2.0))),
            Variant("heads from two forwards of their own", lambda: compare),
        ]

    def writing() -> list[Variant]:
        return [
            Variant("plain", lambda: write()),
            Variant("vhr", lambda: write(VisionAwareHeadReinforcement(2.0))),
            Variant("contrastive decoding", lambda: contrast),
        ]

    return Benchmark("vision_heads", {"read 617": reading, f"write {WRITTEN}": writing}, check)
