"""Image tokens in a prompt, and the same prompt without them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.hf.addresses import unwrap

__all__ = ["image_positions", "image_token", "without"]

IMAGE_TOKEN = ("image_token_id", "image_token_index")
# What a processor gives beside the text; none of it is aligned with tokens.
PICTURES = (
    "pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes", "num_crops",
    "aspect_ratio_ids", "aspect_ratio_mask", "num_tiles",
)  # fmt: skip


def image_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Bool[Tensor, "b s"]:
    """Which positions of the text model hold image features. True at image tokens.

    Raises UnsupportedModel for a model without an image token, ValueError for inputs without token ids or pictures.
    """
    token = image_token(model)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            "image_positions: inputs has no input_ids; image tokens are told by their id, give the ids too"
        )
    found = ids == token
    if not bool(found.any()):
        raise ValueError(
            f"image_positions: none of the {ids.shape[1]} tokens is the image token {token}; give a picture"
        )
    return found


def without(
    inputs: Mapping[str, Any],
    group: Bool[Tensor, "b s"],
    how: str = "drop",
    *,
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """The twin of `inputs` that lacks what is at the positions of `group`, for contrasts with and without.

    group: True at the positions to be without, such as `image_positions`. model: needed when inputs holds pictures, to
    tell their tokens from words.

    - ``"drop"`` takes the tokens out, and the picture with its tokens; rows that end up shorter are padded on the left.
    - ``"blank"`` keeps every position: words are hidden by the attention mask, pictures become their mean colour
      (zeros). A blank picture still has features of its own; the two contrasts answer different questions.
    - ``"swap"`` puts what the next row of the batch has in its group: its words, or its picture.

    Raises ValueError where rows do not fit each other or a picture would be torn apart.
    """
    if how not in ("drop", "blank", "swap"):
        raise ValueError(f"without: how is {how!r}; expected drop, blank or swap")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != group.shape:
        came = tuple(ids.shape) if isinstance(ids, Tensor) else "none"
        raise ValueError(f"without: group has shape {tuple(group.shape)} but input_ids has {came}; they must match")
    group = group.to(ids.device)
    pictures = _pictures_in(inputs, ids, group, model)
    words = group & ~pictures
    twin = dict(inputs)
    if how == "drop":
        return _dropped(twin, group, bool(pictures.any()))
    if how == "blank":
        if bool(pictures.any()):
            twin["pixel_values"] = torch.zeros_like(twin["pixel_values"])
        if bool(words.any()):
            mask = twin.get("attention_mask")
            twin["attention_mask"] = (torch.ones_like(ids) if mask is None else mask).masked_fill(words, 0)
        return twin
    if bool(pictures.any()):
        _swap_pictures(twin, ids.shape[0])
    if bool(words.any()):
        twin["input_ids"] = _swapped_words(ids, words)
    return twin


def image_token(model: nn.Module) -> int:
    """The id of the token that stands for image features. Raises UnsupportedModel for a model without one."""
    inner = unwrap(model)
    for name in IMAGE_TOKEN:
        token = getattr(inner.config, name, None)
        if isinstance(token, int):
            return token
    raise UnsupportedModel(
        f"{type(inner).__name__}: its config names no image token; image positions are known for models that put "
        "pictures among the text tokens, such as LLaVA and Qwen-VL"
    )


def _pictures_in(inputs: Mapping[str, Any], ids: Tensor, group: Tensor, model: nn.Module | None) -> Bool[Tensor, "b s"]:
    """Which positions of the group are image tokens; all of the prompt's, or none."""
    if "pixel_values" not in inputs:
        return torch.zeros_like(group)
    if model is None:
        raise ValueError("without: inputs holds pictures; give model= too, to tell image tokens from words")
    images = ids == image_token(model)
    chosen = images & group
    if bool(chosen.any()) and not torch.equal(chosen, images):
        raise ValueError(
            f"without: group holds {int(chosen.sum())} of {int(images.sum())} image tokens; the model takes pictures "
            "whole, give all of image_positions(model, inputs), or hide some by an edit of attention"
        )
    return chosen


def _dropped(twin: dict[str, Any], group: Tensor, pictures: bool) -> dict[str, Any]:
    batch, length = group.shape
    left = (~group).sum(1)
    if int(left.min()) == 0:
        raise ValueError("without: group is a whole row; something must be left to read")
    longest = int(left.max())
    twin.pop("position_ids", None)  # they counted what is gone
    if "attention_mask" not in twin and int(left.min()) < longest:
        twin["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=group.device)
    for name, value in twin.items():
        if not isinstance(value, Tensor) or value.shape[:2] != group.shape or name in PICTURES:
            continue
        kept = value.new_full((batch, longest, *value.shape[2:]), -100 if name == "labels" else 0)
        for row in range(batch):
            kept[row, longest - int(left[row]) :] = value[row, ~group[row]]
        twin[name] = kept
    return {name: value for name, value in twin.items() if not (pictures and name in PICTURES)}


def _swap_pictures(twin: dict[str, Any], batch: int) -> None:
    pixels, grid = twin["pixel_values"], twin.get("image_grid_thw")
    shapes = grid if grid is not None else twin.get("image_sizes")
    count = len(grid) if grid is not None else len(pixels)
    if batch < 2:
        raise ValueError("without: swap takes the picture of the next row; the batch has one row, give two or more")
    if count % batch or (shapes is not None and not bool((shapes == shapes[:1]).all())):
        raise ValueError(
            f"without: the {batch} rows have {count} pictures, which differ in number or size; swap needs equal ones"
        )
    twin["pixel_values"] = pixels.unflatten(0, (batch, -1)).roll(-1, 0).flatten(0, 1)


def _swapped_words(ids: Tensor, words: Tensor) -> Tensor:
    counts = words.sum(1)
    if len(ids) < 2 or not bool((counts == counts[0]).all()):
        raise ValueError(
            f"without: rows have {counts.tolist()} tokens in the group; swap needs two rows or more with equally many"
        )
    swapped = ids.clone()
    swapped[words] = ids[words].view(len(ids), -1).roll(-1, 0).flatten()
    return swapped
