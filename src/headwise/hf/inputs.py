"""What a model's forward takes, and how long a text it can read."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import InputError
from headwise.hf.addresses import unwrap
from headwise.hf.steps import CACHE_NAMES

__all__ = [
    "as_inputs",
    "cache_of",
    "context_length",
    "frugal",
    "input_device",
    "read_images",
    "takes",
    "vocabulary_size",
    "with_cache",
]

# The names under which configurations keep the longest sequence that their positions allow.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(f"model: {type(model).__name__} has no config; give a transformers model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_length(model: nn.Module, tokenizer: Any = None) -> int | None:
    """How many tokens of text a model reads at once; None where neither the model nor its tokenizer sets a limit."""
    config = _text_config(model)
    found = [value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int) and value > 0]
    table = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    if found and isinstance(table, nn.Embedding) and table.padding_idx is not None:
        found[0] -= table.padding_idx + 1  # RoBERTa counts positions from behind the padding index
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, int) and 0 < limit < 10**9:  # tokenizers without a limit say 10**30
        found.append(limit)
    return min(found) if found else None


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's embedding knows."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(find(), "weight", None) if find is not None else None
    except NotImplementedError:  # models of several towers, such as CLIP, have no one table
        weight = None
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(_text_config(model).vocab_size)


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs: the device of its first weights that are loaded.

    Offloaded weights (``device_map``) lie on the meta device, on which nothing is computed.
    """
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name; wrappers such as PEFT's hand on what they are given."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return name in parameters
    inner = unwrap(model)
    return inner is not model and takes(inner, name)


def cache_of(output: Any) -> Any:
    """The cache that a model's output holds; None where it holds none."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The arguments of a forward that goes on from a cache (None: from an empty one) and returns it."""
    name = next((name for name in CACHE_NAMES if takes(model, name)), CACHE_NAMES[-1])
    return {name: cache, "use_cache": True}


def frugal(model: nn.Module) -> dict[str, Any]:
    """Arguments of forward that spare time where only attention is read: no cache, logits of the last token alone."""
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if takes(model, name)}


def as_inputs(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of one forward, on the model's device.

    inputs: token ids `[b, t]` (pixel values `[b, c, h, w]` for a vision model), or a mapping such as a tokenizer gives.
    An encoder-decoder without decoder inputs is given the encoder's, shifted one to the right.
    """
    if isinstance(inputs, Tensor):
        name = "input_ids" if not inputs.is_floating_point() else getattr(model, "main_input_name", "pixel_values")
        given: dict[str, Any] = {name: inputs}
    elif isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        raise TypeError(f"inputs: {type(inputs).__name__}; give a tensor of token ids, or what the tokenizer returned")
    device = input_device(model)
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and not {"decoder_input_ids", "labels"} & set(given):
        source = given.get("input_ids")
        if source is not None and takes(model, "decoder_input_ids"):
            start = getattr(config, "decoder_start_token_id", None)
            first = torch.full_like(source[:, :1], start if start is not None else 0)
            given["decoder_input_ids"] = torch.cat([first, source[:, :-1]], 1)
    return given


def read_images(model: nn.Module, folder: Path, processor: Any = None) -> list[dict[str, Tensor]]:
    """Every picture of a folder as the model's vision tower takes it, in order of their names.

    processor: the model's image processor; None resizes to the configured size and scales to -1..1.
    Raises InputError for a folder without pictures, a model without a vision tower, or where pillow is missing.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _IMAGES) if folder.is_dir() else []
    if not paths:
        raise InputError(f"images: {folder} holds no picture; expected a folder with {', '.join(_IMAGES[:3])} files")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise InputError('images: pillow is not installed; pip install "headwise[vision]"') from None
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    processor = getattr(processor, "image_processor", processor)
    ready: Any = processor if hasattr(processor, "image_mean") else None
    if ready is None and size is None:
        raise InputError(f"images: {type(model).__name__} says no image size and has no image processor beside it")
    found = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                picture = opened.convert("L" if getattr(config, "num_channels", 3) == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"images: {path} cannot be read as a picture ({error})") from None
        if ready is not None:
            found.append(dict(ready(images=picture, return_tensors="pt")))
            continue
        height, width = (size, size) if isinstance(size, int) else tuple(size)  # pyright: ignore[reportArgumentType]
        picture = picture.resize((width, height))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, -1)
        found.append({"pixel_values": pixels.permute(2, 0, 1)[None].float() / 127.5 - 1})
    return found
