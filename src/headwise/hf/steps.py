"""Filling in a `Step` at every forward, from hooks on the model and on its stacks of layers."""

import contextlib
import inspect
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.step import Step

__all__ = ["CACHE_NAMES", "StepTracker", "find_stacks"]

CACHE_NAMES = ("cache", "past_key_values")
"""The argument that holds the cache, and the field of a model's output: renamed in transformers 5.24."""
CARRIED = "_headwise_carried"
MOST_PARTS = 64  # of ids that are kept one by one before they are joined


def find_stacks(model: nn.Module, places: dict[nn.Module, tuple[str, int]]) -> dict[str, nn.Module]:
    """For each tower, the smallest module that takes its tokens and holds all its attention modules.

    Towers that take no tokens (vision, audio) have none.
    """
    names = {module: name for name, module in model.named_modules()}
    by_name = dict(model.named_modules())
    stacks = {}
    for tower in dict.fromkeys(tower for tower, _ in places.values()):
        paths = [names[module].split(".") for module, (of, _) in places.items() if of == tower]
        family = {tower, "decoder", "cross"} if tower in ("decoder", "cross") else {tower}
        depth = 0
        while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
            depth += 1
        for length in range(depth, -1, -1):
            stack = by_name[".".join(paths[0][:length])]
            if any(of not in family and _contains(stack, module) for module, (of, _) in places.items()):
                break
            if "input_ids" in inspect.signature(stack.forward).parameters:
                stacks[tower] = stack
                break
    return stacks


def _contains(parent: nn.Module, child: nn.Module) -> bool:
    return any(module is child for module in parent.modules())


class GrowingStep(Step):
    """A step that follows another: what nobody asks for is not made, so that a decoded token costs next to nothing.

    Tokens are kept as they came in; what was in a prompt and what was known to be real as masks of the first tokens.
    """

    _batch: int
    _tokens: tuple[Tensor, ...]
    _known_prompt: Tensor  # tokens after these were generated
    _known_real: Tensor | None  # tokens after these are real; None: all are
    _image_token: int | None

    def __init__(self, batch: int, past: int, length: int, carried: dict):
        self._batch, self.past, self.length, self.carried = batch, past, length, carried
        self.wants_weights, self.cache = False, {}

    @classmethod
    def start(cls, batch: int, past: int, device: torch.device) -> "GrowingStep":
        """Tokens about which nothing is known but their number."""
        step, unknown = cls(batch, 0, past, {}), Step.of(batch, past, device)
        step._tokens, step._known_prompt, step._known_real = (unknown.ids,), unknown.prompt, None
        return step

    def followed(self, ids: Tensor, real: Tensor | None, image_token: int | None) -> "GrowingStep":
        """The step of more tokens `[b, t]`. real: `[b, total]`, where the model was told."""
        past, length = self.total, ids.shape[1]
        step = GrowingStep(self.batch, past, length, self.carried)
        step._tokens = (*self._tokens, ids) if len(self._tokens) < MOST_PARTS else (self.ids, ids)
        step._image_token = image_token
        step._known_prompt = self._known_prompt
        if past == 0 or length > 1:
            step._known_prompt = _longer(self._known_prompt, past, False)
            step._known_prompt = _longer(step._known_prompt, past + length, True)
        step._known_real = self._known_real if real is None else real.to(ids.device)
        return step

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def device(self) -> torch.device:
        return self._tokens[-1].device

    @property
    def all_real(self) -> bool:
        return self._known_real is None

    @property
    def rows_real(self) -> bool:
        known = self._known_real
        return known is None or known.shape[1] <= self.past or super().rows_real

    @cached_property
    def ids(self) -> Tensor:
        ids = self._tokens[0] if len(self._tokens) == 1 else torch.cat(self._tokens, 1)
        self._tokens = (ids,)
        return ids

    @cached_property
    def real(self) -> Tensor:
        known = self._known_real
        if known is None:
            return torch.ones(self.batch, self.total, dtype=torch.bool, device=self.device)
        self._known_real = _longer(known, self.total, True)
        return self._known_real

    @cached_property
    def prompt(self) -> Tensor:
        return _longer(self._known_prompt, self.total, False)

    @cached_property
    def images(self) -> Tensor | None:
        return None if self._image_token is None else (self.ids == self._image_token) & self.prompt


def _longer(mask: Tensor, total: int, value: bool) -> Tensor:
    """A mask `[b, n]` with more columns of one value."""
    missing = total - mask.shape[1]
    return torch.nn.functional.pad(mask, (0, missing), value=value) if missing else mask


class StepTracker:
    """Follows the sequence that one stack of one model is working on, in one thread."""

    def __init__(self, stack: nn.Module, image_token: int | None):
        parameters = inspect.signature(stack.forward).parameters.values()
        self.names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        self.image_token = image_token
        self.step: Step | None = None
        # One sequence a cache: guidance, for one, goes on with two in turn.
        self._steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()

    def begin(self, args: tuple, kwargs: dict[str, Any], outer: dict[str, Any]) -> Step | None:
        """The step of a forward with these arguments. outer: those of the whole model, which may hold the ids."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            self.step = None
            return None
        batch, length = tokens.shape[:2]
        if ids is None:
            ids = outer.get("input_ids")
            if ids is None or ids.shape != (batch, length):
                ids = torch.full((batch, length), -1, device=tokens.device)
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        past = int(cache.get_seq_length()) if cache is not None else 0
        real = _real(given.get("attention_mask"), outer.get("attention_mask"), batch, past + length)
        same_cache = cache is not None and cache in self._steps
        before = self._steps[cache] if same_cache else self.step
        self.step = self._extend(ids, real, past, before, same_cache)
        if cache is not None:
            self._steps[cache] = self.step
        self.step.carried = _carried(cache, past, self.step.carried)
        self.step.wants_weights = bool(given.get("output_attentions") or outer.get("output_attentions"))
        return self.step

    def end(self, output: Any) -> None:
        """Lay what edits keep with the cache that a model has made for itself."""
        if self.step is None or not isinstance(output, Mapping):
            return
        cache = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
        if cache is not None and getattr(cache, CARRIED, None) is None:
            _lay(cache, self.step.carried)

    def _extend(self, ids: Tensor, real: Tensor | None, past: int, old: Step | None, same_cache: bool) -> Step:
        batch = ids.shape[0]
        if same_cache and past and old is not None and past < old.total:
            raise RuntimeError(
                f"the cache went back from {old.total} to {past} tokens while headwise was active: assisted decoding "
                "and contrastive search are not supported; generate without them, or after leaving the context"
            )
        if not isinstance(old, GrowingStep) or not past or old.total != past or old.batch != batch:
            old = GrowingStep.start(batch, past, ids.device)
        return old.followed(ids, real, self.image_token)


def _carried(cache: Any, past: int, handed: dict) -> dict:
    """What edits keep with a cache: a copy of the cache has a copy of it, an emptied one starts anew.

    handed: what the forward before has handed on, for caches on which nothing lies yet.
    """
    kept = getattr(cache, CARRIED, None)
    if not isinstance(kept, dict) or past == 0:
        kept = handed
        if cache is not None:
            _lay(cache, kept)
    return kept


def _lay(cache: Any, kept: dict) -> None:
    with contextlib.suppress(AttributeError, TypeError):  # a cache that takes no attributes
        setattr(cache, CARRIED, kept)


def _real(mask: Any, outer: Any, batch: int, total: int) -> Tensor | None:
    """`[b, total]` which tokens are real, from whatever mask was given; None where it does not say."""
    for candidate in (mask, outer):
        if isinstance(candidate, dict):
            candidate = next((m for m in candidate.values() if isinstance(m, Tensor)), None)
        if not isinstance(candidate, Tensor) or candidate.shape[0] != batch:
            continue
        if candidate.ndim == 2 and candidate.shape[1] >= total:
            return candidate[:, :total].bool()
        if candidate.ndim == 4 and candidate.shape[-1] >= total and candidate.shape[-2] > 1:
            shown = candidate if candidate.dtype == torch.bool else candidate > torch.finfo(candidate.dtype).min / 2
            return shown.any(1).any(1)[:, :total]  # a token that no row may see is padding
    return None
