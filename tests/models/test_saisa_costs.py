"""Closed formulas of costs against torch's counter, over the forward and the backward pass."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from headwise.models.saisa import SaisaConfig, SaisaForConditionalGeneration
from headwise.models.saisa_costs import prefill_flops, prefill_parts, training_flops, vision_flops

ALIGNMENTS = ("saisa", "naavit", "embedding")


def network(alignment: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = SaisaForConditionalGeneration(SaisaConfig.example(alignment, **changes))  # type: ignore[arg-type]
    model.set_attn_implementation("eager")
    return model


def prompt(before: int, after: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 64, (1, before + 16 + after))
    ids[:, before : before + 16] = 1
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}


def test_the_tower():
    model = network("saisa")
    with FlopCounterMode(display=False) as counter:
        model.model.vision_tower(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() == vision_flops(model.config)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_prefill_is_what_is_counted(alignment: str, kv: int):
    example: Any = SaisaConfig.example().text_config
    text = {**example.to_dict(), "num_key_value_heads": kv, "head_dim": 12}
    model, given = network(alignment, text_config=text), prompt(3, 7)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)
        with FlopCounterMode(display=False) as counter:
            hidden = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-1]
            tower = counter.get_total_flops()
            projected = hidden[:, 1:] if alignment == "saisa" else model.model.multi_modal_projector(hidden[:, 1:])
            images.pooler_output = list(projected)
            model.model(given["input_ids"], mm_encoder_outputs={"image": images})
    counted = counter.get_total_flops() - tower
    assert counted == prefill_flops(model.config, text=10, image=16) == sum(prefill_parts(model.config, 10, 16))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("stage", ["projectors", "all"])
def test_training_is_what_is_counted(alignment: str, stage: str):
    model, given = network(alignment).train(), prompt(3, 7)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == "all":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    labels = given["input_ids"].masked_fill(given["input_ids"] == 1, -100)
    with FlopCounterMode(display=False) as counter:
        model(**given, labels=labels, use_cache=False).loss.backward()
    assert counter.get_total_flops() == training_flops(model.config, 10, 16, stage)
    alone = training_flops(model.config, 10, 16, stage, vision=False)
    assert counter.get_total_flops() - alone == vision_flops(model.config)


def test_the_abstract_at_the_sizes_of_llava():
    """66 % at 64 text tokens, by hand: L [8 n d^2 + 4 n^2 d + 6 n d m] and what SAISA leaves of it."""
    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    ours, llava = (SaisaConfig(alignment, text_config=text) for alignment in ("saisa", "embedding"))
    d, m, layers, v, c, t = 4096, 11008, 32, 576, 1024, 64
    n = t + v
    whole = layers * (8 * n * d * d + 4 * n * n * d + 6 * n * d * m) + 2 * v * (c * d + d * d)
    left = layers * (4 * t * d * d + 4 * n * d * d + 4 * t * n * d + 6 * t * d * m + 2 * v * (c * d + d * d))
    assert prefill_flops(llava, t, v) == whole and prefill_flops(ours, t, v) == left
    assert 1 - left / whole == pytest.approx(0.66, abs=0.01)
    naavit = SaisaConfig("naavit", text_config=text)
    assert 1 - prefill_flops(naavit, t, v) / whole == pytest.approx(0.18, abs=0.01)


def test_refusals():
    config = SaisaConfig.example()
    with pytest.raises(ValueError, match="0 text and 16 image tokens; expected 1 or more"):
        prefill_flops(config, 0, 16)
    with pytest.raises(ValueError, match="stage is 'both'; choose 'projectors' or 'all'"):
        training_flops(config, 4, 16, "both")
    assert prefill_flops(config, 4, 0) == prefill_flops(SaisaConfig.example("naavit"), 4, 0)
