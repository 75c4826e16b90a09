"""Inputs that headwise makes up, to run a model once and see how it is built."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.hf.inputs import input_device

__all__ = ["own_inputs"]


def own_inputs(model: PreTrainedModel, tower: str, path: str) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """A few tokens, or one picture or sound of noise, and the part of the model that takes them."""
    owners = [model.get_submodule(path.rsplit(".", cut)[0]) for cut in range(1, path.count(".") + 1)]
    parts = [part for part in [*owners, model] if isinstance(part, PreTrainedModel)]
    runner = model if tower in ("", "decoder", "encoder") else parts[0]
    config: Any = runner.config
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {}
    accepts = set(inspect.signature(runner.forward).parameters)
    if runner.main_input_name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is not None:
            height, width = size if isinstance(size, tuple | list) else (size, size)
            given["pixel_values"] = torch.randn(1, channels, height, width, generator=generator)
    elif runner.main_input_name == "input_features":
        if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
            shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
            given["input_features"] = torch.randn(shape, generator=generator)
    elif ("input_ids" in accepts and "pixel_values" not in accepts) or tower == "":
        given["input_ids"] = _some_tokens(config)
    if not given:
        raise ValueError(
            f"sites: headwise cannot make up inputs for tower {tower!r} of {type(model).__name__}; "
            "give some, as in find_sites(model, tower=..., inputs=processor(...))"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepts:
        given["decoder_input_ids"] = _some_tokens(config)
    device = input_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in given.items()}
    return moved, runner


def _some_tokens(config: Any) -> Tensor:
    """Eight different tokens from the middle of the vocabulary that stand for nothing special."""
    text = config.get_text_config(decoder=True)
    size = text.vocab_size
    special = {
        value
        for owner in (config, text)
        for name, value in vars(owner).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usual = [
        token for token in torch.linspace(size // 4, size - 1, 64).long().unique().tolist() if token not in special
    ]
    return torch.tensor([usual[:: max(1, len(usual) // 8)][:8]])
