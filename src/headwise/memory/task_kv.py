"""KV caches with a budget for each head, for any transformers model of full attention.

Constructing the cache is all there is to do: it sends the model's attention through headwise, as `steer` does, and
gives the model its own implementation back when the cache is dropped or closed. Edits and probes work with it.

Paper: headwise/papers/task_kv.py (He, Liu, Chen, 2025).
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from headwise.attend.addresses import Head, select_heads
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout, tower_kinds, unwrap
from headwise.hf.head_budgets import BudgetPolicy, HeadBudgetLayer, LayerPrompt
from headwise.hf.shares import head_share
from headwise.memory.budget_policies import HeadMapPolicy, Middle, TaskKVPolicy

__all__ = ["HeadBudgetCache", "TaskKVCache"]

INSTEAD = "use transformers' DynamicCache"


class HeadBudgetCache(Cache):
    """A KV cache that keeps of each prompt what a policy says, head by head, and everything that comes after it.

    model: the only model that it serves. policy: `TaskKVPolicy`, `SnapKVPolicy`, `StreamingPolicy`, `HeadMapPolicy` or
    any callable of that form. A text of several tokens is a prompt, compressed as soon as it has been read, layer by
    layer; later texts are kept whole. (While nothing was dropped, a later text counts with what came before it.)
    chunked: prompts come in pieces (`prefill_chunk_size`): compress at the first single token, or at
    `finish_prefill()`.

    Batches, grouped key heads, left padding, beams, `num_return_sequences` and `copy.deepcopy` work; assisted decoding
    does not. Nothing that is kept can be differentiated.
    Raises UnsupportedModel for a model with sliding-window, linear or latent attention, an encoder-decoder, a mechanism
    in the place of attention, an implementation other than "sdpa" and "eager", heads shared by several processes.
    """

    def __init__(self, model: nn.Module, policy: BudgetPolicy, *, chunked: bool = False):
        if not callable(policy) or not hasattr(policy, "window"):
            raise TypeError(
                f"HeadBudgetCache: policy is {type(policy).__name__}; give a policy such as SnapKVPolicy(budget=0.4)"
            )
        modules = _served(model)
        said: set[str] = set()
        layers: list[Any] = [
            HeadBudgetLayer(policy, module, number, len(modules), chunked=chunked, said=said)
            for number, module in enumerate(modules)
        ]
        super().__init__(layers=layers)
        self.policy = policy
        self._connect([module.config for module in modules])

    def _connect(self, configs: list[Any]) -> None:
        self._configs = list({id(config): config for config in configs}.values())
        for config in self._configs:
            dispatch.switch(config)
        self._release = weakref.finalize(self, _restore, self._configs)
        self._release.atexit = False

    def close(self) -> None:
        """Give the model its own attention back; the cache serves no more. Happens by itself when it is dropped."""
        self._release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeadBudgetCache":
        new = object.__new__(type(self))
        memo[id(self)] = new
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_release", "_configs", "policy")}
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in kept.items()})
        new.policy = self.policy
        new._connect(self._configs)
        return new

    def fork(self, policy: BudgetPolicy) -> "HeadBudgetCache":
        """A copy of a cache that holds a prompt and has dropped nothing, compressed by another policy.

        So several policies share one reading of the prompt: read it with `chunked=True`, then fork.
        Raises ValueError when something was dropped already, or the policy wants to see more queries than are known.
        """
        new = object.__new__(HeadBudgetCache)
        layers: list[Any] = [layer.fork(policy) for layer in self._layers]
        Cache.__init__(new, layers=layers)
        new.policy = policy
        new._connect(self._configs)
        new.finish_prefill()
        return new

    @property
    def _layers(self) -> list[HeadBudgetLayer]:
        return self.layers  # pyright: ignore[reportReturnType]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As every cache's. Raises RuntimeError where an earlier layer's keys were never attended to."""
        if layer_idx and self._layers[layer_idx - 1].pending:
            self._layers[layer_idx - 1].refuse_pending()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def prompts(self) -> list[LayerPrompt]:
        """What a policy sees of each layer, while nothing was compressed: queries of the last tokens, keys, values.

        Raises ValueError before a prompt was read (with `chunked=True`) and after it was compressed.
        """
        found = [layer.prompt() for layer in self._layers]
        if any(prompt is None for prompt in found):
            raise ValueError("prompts: there is no uncompressed prompt; read one with chunked=True")
        return [prompt for prompt in found if prompt is not None]

    def finish_prefill(self) -> None:
        """Say that the prompt is whole: compress what was not compressed yet; texts that follow are kept."""
        for layer in self._layers:
            layer.compress()
            layer.whole_prompt = True

    def kept_positions(self, layer: int) -> list[list[list[int]]]:
        """For each row and key head of a layer the positions that it holds, padding included where it is held."""
        return [[torch.nonzero(head)[:, 0].tolist() for head in row] for row in self.held(layer)]

    def held(self, layer: int) -> Bool[Tensor, "b n s"]:
        """`kept_positions` as a mask over all tokens seen. Raises ValueError before a text was read."""
        return self._layers[layer].held_positions()

    @property
    def heterogeneous(self) -> list[Int[Tensor, "b f"] | None]:
        """For each layer the key heads that keep everything; None where nothing was dropped."""
        return [
            None if layer.split is None else layer.split.order[:, : layer.split.full].sort(1).values
            for layer in self._layers
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held, without the room for more."""
        return sum(rectangle.nbytes for layer in self._layers for rectangle in layer.rectangles())

    @property
    def allocated(self) -> int:
        """Bytes that the cache takes, room for more tokens and bookkeeping included."""
        held = sum(rectangle.allocated for layer in self._layers for rectangle in layer.rectangles())
        splits = [layer.split for layer in self._layers if layer.split is not None]
        return held + sum(split.nbytes for split in splits)

    @property
    def share(self) -> float:
        """Bytes held over those of a cache that drops nothing."""
        whole = 0
        for layer in self._layers:
            for rectangle in layer.rectangles():
                whole += rectangle.nbytes // max(1, rectangle.length) * layer.seen
        return self.nbytes / whole if whole else 1.0


class TaskKVCache(HeadBudgetCache):
    """Task-KV: heads far from the semantic centre of their layer keep the prompt, the others a part of it.

    budget: bytes kept of a prompt's cache over all layers, as a share. full_heads: None lets the paper's separator
    choose the heads of each prompt anew; a selection ("1.3, 2.*") or heads of a head map keep everything instead (a key
    head does when one of its query heads is named). The other arguments are those of `TaskKVPolicy`.
    Raises ValueError for arguments out of range, for full heads that the model lacks or that alone take the budget;
    UnsupportedModel as `HeadBudgetCache`.

    >>> cache = TaskKVCache(model, budget=0.4)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float = 0.4,
        full_heads: str | Iterable[Head | str] | None = None,
        *,
        beta: float = 0.25,
        min_heads: int | None = None,
        sink: int = 16,
        recent: int = 256,
        window: int = 32,
        top: int | None = 256,
        pool: int = 7,
        middle: Middle = "top",
        supplement: int = 1,
        normalize: bool = False,
        chunked: bool = False,
    ):
        common: dict[str, Any] = {
            "budget": budget, "sink": sink, "recent": recent, "window": window, "top": top, "pool": pool,
            "middle": middle,
        }  # fmt: skip
        if full_heads is None:
            policy = TaskKVPolicy(**common, beta=beta, min_heads=min_heads, supplement=supplement, normalize=normalize)
            most = max(_key_heads(model))
            if min_heads is not None and min_heads > most:
                raise ValueError(f"TaskKVCache: min_heads is {min_heads}; the model has {most} key heads in a layer")
        else:
            heads = _key_heads(model)
            policy = HeadMapPolicy(**common, full=_named(model, full_heads), heads=heads)
        super().__init__(model, policy, chunked=chunked)


def _key_heads(model: nn.Module) -> tuple[int, ...]:
    return layout(unwrap(model)).tower("").kv_heads


def _named(model: nn.Module, heads: str | Iterable[Head | str]) -> tuple[tuple[int, ...], ...]:
    """The key heads of each layer that a selection of query heads names."""
    everything = layout(unwrap(model))
    tower = everything.tower("")
    found: list[set[int]] = [set() for _ in tower.kv_heads]
    for head in select_heads(heads, everything):
        if head.tower:
            raise ValueError(f"full_heads: {head} is not in the text decoder, whose cache this is")
        found[head.layer].add(head.head * tower.kv_heads[head.layer] // tower.heads[head.layer])
    return tuple(tuple(sorted(layer)) for layer in found)


def _restore(configs: list[Any]) -> None:
    for config in configs:
        dispatch.restore(config)


def _served(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a model's text decoder in the order of its cache, or why they cannot be served."""
    inner: Any = unwrap(model)
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"HeadBudgetCache: {name} is an encoder-decoder, whose cache has two parts; {INSTEAD}")
    places = attention_modules(inner)
    modules = [module for module, (tower, _) in places.items() if tower == ""]
    if tower_kinds(inner).get("") != "causal":
        raise UnsupportedModel(f"HeadBudgetCache: {name} has no causal text decoder, so it has no cache of keys")
    for number, layer in enumerate(DynamicCache(config=inner.config).layers):
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__.removeprefix("Dynamic").removesuffix("Layer")
            words = "sliding-window attention" if getattr(layer, "is_sliding", False) else f"{kind} layers"
            raise UnsupportedModel(
                f"HeadBudgetCache: layer {number} of {name} has {words}, which no budget for heads fits; {INSTEAD}"
            )
    if any(getattr(module.config, "kv_lora_rank", None) for module in modules):
        raise UnsupportedModel(
            f"HeadBudgetCache: {name} caches latents that its heads share (multi-head latent attention), so heads "
            f"cannot keep different tokens; {INSTEAD}"
        )
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    if sorted(number for number in numbers if isinstance(number, int)) != list(range(len(modules))):
        raise UnsupportedModel(f"HeadBudgetCache: the layers of {name} are numbered {numbers}; expected 0, 1, 2, ...")
    for module in modules:
        where = f"layer {getattr(module, 'layer_idx', '?')} of {name}"
        if dispatch.mechanism_of(module) is not None:
            raise UnsupportedModel(f"HeadBudgetCache: a mechanism stands in for attention in {where}; {INSTEAD}")
        base = dispatch.previous_name(module.config)
        if base not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"HeadBudgetCache: {where} uses {base!r}, which takes no mask for single heads; load the model with "
                'attn_implementation="sdpa" or "eager"'
            )
        if getattr(module, "sinks", None) is not None:
            raise UnsupportedModel(f"HeadBudgetCache: {where} has learned sinks, which it does not know; {INSTEAD}")
        if head_share(module) is not None:
            raise UnsupportedModel(
                f"HeadBudgetCache: the heads in {where} are shared by several processes (tensor parallelism), and a "
                f"policy would see a part of them; {INSTEAD}"
            )
    return sorted(modules, key=lambda module: int(getattr(module, "layer_idx", 0)))
