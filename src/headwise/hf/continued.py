"""A prompt that is read once and continued in several ways: its cache is shared, its pictures are encoded once."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from headwise.errors import UnsupportedModel
from headwise.hf.addresses import unwrap
from headwise.hf.inputs import as_inputs, cache_of, takes, with_cache

__all__ = ["ReadPrompt", "read_prompt"]


@dataclass(frozen=True)
class ReadPrompt:
    """What is known after some tokens: the next token's logits, and the cache to go on from.

    Nothing here changes: `select` and `extend` give new ones, and this one can be continued again. mask: 1 at real
    tokens. shift: `[b 1]` what the pictures of each row take off later positions, in models whose pictures have
    positions in three directions; None in others.
    """

    model: nn.Module
    cache: DynamicCache
    mask: Int[Tensor, "b s"]
    logits: Float[Tensor, "b v"]
    shift: Tensor | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, rows: Sequence[int] | Tensor) -> "ReadPrompt":
        """Some of the rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.mask.device)
        cache = _apart(self.cache)
        cache.batch_select_indices(index)
        shift = None if self.shift is None else self.shift[index]
        return replace(self, cache=cache, mask=self.mask[index], logits=self.logits[index], shift=shift)

    @torch.no_grad()
    def extend(self, ids: Int[Tensor, "b t"]) -> "ReadPrompt":
        """Read some more tokens of every row."""
        mask = torch.cat([self.mask, torch.ones_like(ids, dtype=self.mask.dtype)], 1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.shift is not None:
            given["position_ids"] = (positions + self.shift).expand(3, *positions.shape)
        elif takes(unwrap(self.model), "position_ids"):
            given["position_ids"] = positions
        cache = _apart(self.cache)
        output = self.model(**given, **with_cache(self.model, cache), **_last_logits(self.model))
        return replace(self, cache=cache, mask=mask, logits=output.logits[:, -1])


@torch.no_grad()
def read_prompt(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> ReadPrompt:
    """Run the model over prompts of whole rows, padded on the left where they differ in length.

    Raises ValueError for padding on the right, UnsupportedModel for a cache that cannot be shared (recurrent layers).
    """
    given = as_inputs(model, inputs)
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        raise ValueError("read_prompt: inputs has no input_ids; give the tokens of the prompt")
    mask = given["attention_mask"] = given.get("attention_mask", torch.ones_like(ids)).long()
    if not bool(mask[:, -1].all()):
        raise ValueError(
            f"read_prompt: {int((mask[:, -1] == 0).sum())} of {len(ids)} prompts end in padding; what follows must "
            "follow the last word, pad on the left (tokenizer.padding_side = 'left')"
        )
    turning = [part for part in unwrap(model).modules() if hasattr(part, "get_rope_index")]
    if not turning and takes(unwrap(model), "position_ids"):
        given.setdefault("position_ids", (mask.cumsum(1) - 1).clamp_min(0))
    for part in turning:
        setattr(part, "rope_deltas", None)  # of an earlier prompt  # noqa: B010
    output = model(**given, **_last_logits(model), use_cache=True)
    shift = next((part.rope_deltas for part in turning if isinstance(part.rope_deltas, Tensor)), None)
    if shift is None and turning:
        shift = torch.zeros_like(ids[:, :1])
    cache = cache_of(output)
    layers = getattr(cache, "layers", [None])
    if not all(isinstance(x, DynamicLayer) and not isinstance(x, LinearAttentionCacheLayerMixin) for x in layers):
        raise UnsupportedModel(
            f"{type(unwrap(model)).__name__}: its cache holds {type(layers[0]).__name__}, which is changed in place; a "
            "prompt is shared where every layer caches keys and values"
        )
    return ReadPrompt(model, cache, mask, output.logits[:, -1], shift)


def _last_logits(model: nn.Module) -> dict[str, Any]:
    return {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}


def _apart(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in layers of its own: a dynamic layer that grows makes new tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other
