"""The network of the two recipes with dual cross-attention: a small vision transformer, or one from a checkpoint."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from headwise.errors import InputError
from headwise.hf.load import load
from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.recipes._pictures import patch_of


@dataclass(frozen=True)
class Wrapped:
    """A network with dual cross-attention, and what its images need: a mean and a spread, and whether positions fit."""

    model: DualCrossAttention
    mean: Tensor
    spread: Tensor
    interpolate: bool

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch as the network takes it."""
        batch = default_collate(items)
        batch["pixel_values"] = (batch["pixel_values"] - self.mean) / self.spread
        return batch | ({"interpolate_pos_encoding": True} if self.interpolate else {})

    @torch.no_grad()
    def read(self, data: Dataset, batch: int = 64) -> Any:
        """The network's output for each batch of some images, as (output, the batch)."""
        self.model.eval()
        for given in DataLoader(data, batch, collate_fn=self.collate):
            inputs = {name: _placed(value, self.model.device) for name, value in given.items() if name != "labels"}
            yield self.model(**inputs), given


def _placed(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def wrap(
    size: tuple[int, int, int],
    classes: int,
    *,
    dual: bool,
    backbone: str | None,
    network: Mapping[str, Any] | None,
    **options: Any,
) -> Wrapped:
    """A network for images `[c h w]` of a size.

    dual: with GLCA and PWCA; without, the same network and objective alone. backbone: a checkpoint of transformers;
    None makes a small ViT, of sizes in `network` (`ViTConfig`). options: of `DualCrossAttention`.
    Raises InputError for a checkpoint that reads other images than these.
    """
    if not dual:
        options |= {"glca_layers": 0, "pwca": False}
    if backbone is None:
        return Wrapped(DualCrossAttention(_small(size, network or {}), classes, **options), *_scale(None), False)
    if network:
        raise InputError(
            f"network: sizes {', '.join(network)} are given beside the checkpoint {backbone}; leave out one"
        )
    loaded = load(backbone, dtype="float32")
    model: Any = loaded.model
    wrapped = DualCrossAttention(model, classes, **options)
    channels = getattr(model.config, "num_channels", 3)
    if channels != size[0]:
        raise InputError(f"backbone: {backbone} reads images of {channels} channels, the data has {size[0]}")
    given = model.config.image_size
    fits = tuple(given if isinstance(given, list | tuple) else (given, given)) == size[1:]
    takes = "interpolate_pos_encoding" in inspect.signature(model.base_model.embeddings.forward).parameters
    return Wrapped(wrapped, *_scale(loaded.processor), interpolate=takes and not fits)


def _small(size: tuple[int, int, int], network: Mapping[str, Any]) -> Any:
    from transformers import ViTConfig, ViTModel

    channels, height, width = size
    patch = patch_of(height, width)
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, **network}
    wide = sizes["hidden_size"]
    # DeiT's spread of 0.02 is for wide networks: narrow ones learn far slower from it than from torch's own.
    sizes = {"intermediate_size": 2 * wide, "initializer_range": max(0.02, (3 * wide) ** -0.5), **sizes}
    grid: dict[str, Any] = {"image_size": (height, width), "patch_size": (patch, patch), "num_channels": channels}
    return ViTModel(ViTConfig(**{**grid, **sizes}))


def _scale(processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and spread `[c 1 1]` that a checkpoint's images are given with; 0 and 1 where it does not say."""
    mean, spread = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not mean or not spread or not getattr(processor, "do_normalize", True):
        mean, spread = [0.0], [1.0]
    return torch.tensor(mean)[:, None, None], torch.tensor(spread)[:, None, None]
