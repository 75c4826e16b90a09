"""A layer of a transformers cache whose key heads keep different numbers of tokens.

Two rectangles hold a layer: the heads that keep everything, and the heads that keep as many tokens as each other, which
ones being each head's own affair. So a call of attention is two ordinary calls on some of the heads each. Which heads
and which tokens is a policy's decision, made when the prompt has been read; tokens that come later stay in every head.

Facts about caches that this rests on are in transformers' `cache_utils` and `masking_utils`: keys are cached after the
rotary embedding, so a kept key keeps its position; masks are built for the length that the layer tells, which is the
number of tokens seen, and the columns of what a head keeps are taken out of them here.
"""

import warnings
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.ops.masks import hide_exactly

__all__ = ["BudgetPolicy", "HeadBudgetLayer", "KeptTokens", "LayerPrompt"]

SLACK = 64  # tokens: the least room that a buffer is given beyond what it holds; an eighth of its length where more


@dataclass(frozen=True)
class LayerPrompt:
    """What a policy sees of a layer when its prompt has been read. lengths: real tokens of each row.

    query: those of the last w positions. real: None where nothing is padding. layer: of `layers`, counted from 0.
    """

    query: Float[Tensor, "b h w d"]
    key: Float[Tensor, "b n s d"]
    value: Float[Tensor, "b n s e"]
    real: Bool[Tensor, "b s"] | None
    lengths: list[int]
    scale: float
    softcap: float | None
    layer: int
    layers: int


@dataclass(frozen=True)
class KeptTokens:
    """What a layer keeps of its prompt. full: the key heads that keep everything, equally many in every row.

    positions: those that each head keeps, ascending, rows ending in -1 where a text is shorter; what stands there for a
    full head does not matter. over: why this is more than the budget, where it is. extra: keys and values
    `[b n s d], [b n s e]` to take instead of the layer's own at these positions.
    """

    full: Bool[Tensor, "b n"]
    positions: Int[Tensor, "b n w"]
    over: str | None = None
    extra: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class BudgetPolicy(Protocol):
    """Decides what the heads of a layer keep of a prompt. window: how many of the last queries it wants to see."""

    @property
    def window(self) -> int: ...

    def __call__(self, prompt: LayerPrompt) -> KeptTokens | None:
        """None: everything."""
        ...


class Rectangle:
    """Keys and values `[b n s d]` of heads that keep equally many tokens, with room for more."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._keys, self._values, self.length, self.shared = keys, values, keys.shape[2], False

    def share(self) -> "Rectangle":
        """The same tokens for another cache, copied when it adds to them."""
        twin = Rectangle(self.keys, self.values)
        twin.shared = True
        return twin

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def allocated(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self._keys, self._values))

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def append(self, keys: Tensor, values: Tensor) -> None:
        end = self.length + keys.shape[2]
        # What inference mode made may not be written outside of it.
        frozen = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if end > self._keys.shape[2] or frozen or self.shared:
            self.shared = False
            self._keys, self._values = (_roomier(x, self.length, end) for x in (self._keys, self._values))
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end

    def rows(self, index: Tensor) -> None:
        self._keys, self._values = (x.index_select(0, index) for x in (self._keys, self._values))


def _roomier(x: Tensor, length: int, needed: int) -> Tensor:
    b, n, _, d = x.shape
    new = x.new_empty(b, n, needed + max(SLACK, needed // 8), d)
    new[:, :, :length] = x[:, :, :length]
    return new


@dataclass
class Split:
    """How the heads of a layer are told apart after compression. order: key heads, the full ones first.

    positions: `[b light w]` of the prompt's tokens that the light heads keep, -1 where a row keeps fewer. end: tokens
    seen when the prompt was compressed; those that came later are in every head.
    """

    order: Int[Tensor, "b n"]
    full: int
    positions: Int[Tensor, "b m w"]
    end: int
    has_empty: bool
    inverse: Int[Tensor, "b n"] = field(init=False)

    def __post_init__(self) -> None:
        self.inverse = self.order.argsort(1)

    @property
    def sorts(self) -> bool:
        """Whether there are heads of both kinds, so that they must be put in order."""
        return 0 < self.full < self.order.shape[1]

    def sort(self, x: Tensor, groups: int = 1) -> Tensor:
        """`[b n*groups ..]` with the heads of the full key heads first."""
        return _take_heads(x, self.order, groups) if self.sorts else x

    def unsort(self, x: Tensor, groups: int) -> Tensor:
        """Undo `sort`."""
        return _take_heads(x, self.inverse, groups) if self.sorts else x

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.order, self.inverse, self.positions))

    def rows(self, index: Tensor) -> "Split":
        return replace(self, order=self.order.index_select(0, index), positions=self.positions.index_select(0, index))

    def all_positions(self, seen: int) -> Tensor:
        """`[b light w + later]`."""
        b, m, _ = self.positions.shape
        later = torch.arange(self.end, seen, device=self.positions.device).expand(b, m, -1)
        return torch.cat([self.positions, later], 2)


def _take_heads(x: Tensor, order: Tensor, groups: int) -> Tensor:
    b, h = x.shape[:2]
    index = (order[:, :, None] * groups + torch.arange(groups, device=order.device)).view(b, h)
    return x.gather(1, index.view(b, h, *[1] * (x.ndim - 2)).expand_as(x))


class HeadBudgetLayer(CacheLayerMixin):
    """One layer of a `HeadBudgetCache`: appends, attends, and compresses its prompt as its policy says.

    module: the attention module whose keys it holds. said: shared by the layers of a cache: what was warned of already.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # a rollback into the prompt cannot be undone
    supports_early_init = False

    def __init__(
        self, policy: BudgetPolicy, module: nn.Module, number: int, layers: int, *, chunked: bool, said: set[str]
    ):
        super().__init__()
        self.policy, self.number, self.layers, self.chunked, self.said = policy, number, layers, chunked, said
        self.module = weakref.ref(module)
        self.reset()

    # Length

    def reset(self) -> None:
        """Forget everything; the next text may have another batch size."""
        self.is_initialized = self.pending = False
        self.whole_prompt = self.decoded = False
        self.seen, self.batch = 0, None
        self.all: Rectangle | None = None  # before compression
        self.full: Rectangle | None = None
        self.light: Rectangle | None = None
        self.split: Split | None = None
        self.observed: tuple[Tensor, Tensor | None, float, float | None] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized, self.batch = True, key_states.shape[0]
        self.device = key_states.device

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens stored: positions of new tokens follow from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # Filling

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens. They are returned as they came; what attends to them comes here for
        the rest. No graph is kept: what is stored is detached."""
        self._check(key_states, kwargs.get("kwargs") or kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[2]
        if length == 1 and self.observed is not None:
            self.compress()  # a prompt that came in chunks is over
        if self.seen and length > 1 and not self.chunked and not self.decoded and not self.whole_prompt:
            self._warn(
                "pieces",
                f"HeadBudgetCache: a second text came before any token was generated, so the prompt was taken to be "
                f"the first {self.seen} tokens; give chunked=True for a prompt in pieces, or call "
                "cache.finish_prefill() after the prompt",
            )
        self.decoded |= length == 1 and self.seen > 0
        key, value = key_states.detach(), value_states.detach()
        if self.split is not None:
            key, value = self.split.sort(key), self.split.sort(value)
            for rectangle, heads in ((self.full, slice(self.split.full)), (self.light, slice(self.split.full, None))):
                if rectangle is not None:
                    rectangle.append(key[:, heads], value[:, heads])
        elif self.all is None:
            self.all = Rectangle(key, value)
        else:
            self.all.append(key, value)
        self.seen += length
        self.pending = True
        dispatch.hold(key_states, self)
        return key_states, value_states

    def _check(self, key: Tensor, options: dict[str, Any]) -> None:
        module = self.module()
        if self.pending:
            self.refuse_pending()
        if module is not None and module.training:
            raise ValueError("HeadBudgetCache: the model is in training mode; call model.eval() before it generates")
        if options.get("use_cache") is False:
            raise ValueError("HeadBudgetCache: use_cache=False was given together with a cache; leave out one of them")
        if self.batch is not None and key.shape[0] != self.batch:
            raise ValueError(
                f"HeadBudgetCache: it holds a batch of {self.batch} and was given one of {key.shape[0]}; call reset() "
                "for another text, or batch_repeat_interleave() to give each row several continuations"
            )

    def refuse_pending(self) -> None:
        """Raises RuntimeError: keys were stored, but no attention of the cache's model came for them."""
        raise RuntimeError(
            "HeadBudgetCache: keys were stored but no attention of the cache's own model came for them; the cache was "
            "given to another model or was closed, the model's attn_implementation was set after the cache was made, "
            "or the model is compiled; make a cache for each model, and reset() this one"
        )

    def settle(self, module: nn.Module, query: Tensor, mask: Any, **options: Any) -> None:
        """After a call of attention: remember what the policy wants to see, and compress when the prompt is there."""
        self.pending = False
        length = query.shape[2]
        if self.split is not None or (length == 1 and self.seen > 1):
            return
        kept = query.detach()[:, :, -self.policy.window :]
        if self.observed is not None and kept.shape[2] < self.policy.window:
            kept = torch.cat([self.observed[0], kept], 2)[:, :, -self.policy.window :]
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        self.observed = (kept, self._real(mask), scale, options.get("softcap"))
        if not self.chunked or self.whole_prompt:
            self.compress()

    def _real(self, mask: Any) -> Tensor | None:
        """`[b s]` which tokens are real: those that the last one sees. Raises ValueError for right padding."""
        if mask is None:
            return None
        seen = mask if mask.dtype == torch.bool else hide_exactly(mask) != -torch.inf
        real = seen[:, 0, -1, : self.seen].expand(self.batch or 1, -1)
        if bool(real.all()):
            return None
        if not bool(real[:, -1].all()):
            raise ValueError(
                "HeadBudgetCache: a text ends in padding, so the last queries would be those of pad tokens; pad on the "
                'left (tokenizer.padding_side = "left")'
            )
        return real

    def prompt(self) -> LayerPrompt | None:
        """What a policy sees; None where there is nothing to decide."""
        if self.observed is None or self.all is None:
            return None
        query, real, scale, softcap = self.observed
        key, value = self.all.keys, self.all.values
        lengths = [self.seen] * key.shape[0] if real is None else real.sum(1).tolist()
        return LayerPrompt(query, key, value, real, lengths, scale, softcap, self.number, self.layers)

    def compress(self) -> None:
        """Let the policy decide over what was read so far. Nothing happens where it keeps everything, and the next
        text is then looked at together with this one."""
        prompt = self.prompt()
        if prompt is None:
            return
        self.observed = None
        key, value, seen = prompt.key, prompt.value, self.seen
        found = self.policy(prompt)
        if found is None or found.positions.shape[2] >= seen or bool(found.full.all()):
            return
        if found.over is not None:
            self._warn("over", found.over)
        count = found.full.sum(1)
        if bool((count != count[0]).any()):
            raise ValueError(f"HeadBudgetCache: a policy named {count.tolist()} full heads; expected one number")
        full = int(count[0])
        order = found.full.logical_not().long().sort(dim=1, stable=True).indices
        positions = _take_heads(found.positions, order, 1)[:, full:].contiguous()
        self.split = Split(order, full, positions, seen, bool((positions < 0).any()))
        rows = torch.arange(key.shape[0], device=key.device)[:, None]
        heads, index = order[:, full:], positions.clamp_min(0)
        source = found.extra if found.extra is not None else (key, value)
        light = [x[rows[:, :, None], heads[:, :, None], index] for x in source]
        self.light = Rectangle(*light)
        self.full = Rectangle(*(x[rows, order[:, :full]] for x in (key, value))) if full else None
        self.all = None

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            warnings.warn(text, stacklevel=2)

    # Attending

    def attend(
        self, function: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`[b t h e]` and weights (None where the heads keep different keys)."""
        self._expect(module, options)
        if self.split is None:
            if self.all is not None and self.all.length > key.shape[2]:
                key, value = self.all.keys, self.all.values
                mask = self._causal(query, mask)
            return function(module, query, key, value, mask, **options)
        split, groups = self.split, query.shape[1] // key.shape[1]
        mask = self._causal(query, mask)
        query, parts = split.sort(query, groups), []
        if mask is not None and mask.shape[1] > 1:
            mask = split.sort(mask, groups)
        if self.full is not None:
            heads = slice(0, split.full * groups)
            seen = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
            parts.append(self._call(function, module, query[:, heads], self.full, seen, options))
        if self.light is not None:
            heads = slice(split.full * groups, None)
            seen = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
            seen = self._light_mask(seen, groups)
            parts.append(self._call(function, module, query[:, heads], self.light, seen, options))
        out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return split.unsort(out.transpose(1, 2), groups).transpose(1, 2).contiguous(), None

    @staticmethod
    def _call(
        function: Any, module: nn.Module, query: Tensor, held: Rectangle, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        return function(module, query, held.keys, held.values, mask, **options)[0]

    def _expect(self, module: nn.Module, options: dict[str, Any]) -> None:
        if module is not self.module():
            raise ValueError(
                f"HeadBudgetCache: it was made for another model than the one it was given to ({type(module).__name__} "
                "of that one attends); make a cache for each model"
            )
        named = next((name for name in ("s_aux", "position_bias") if options.get(name) is not None), None)
        if named is not None:
            raise UnsupportedModel(
                f"{type(module).__name__}: attention with {named} is not supported by a cache with budgets for heads; "
                "use transformers' DynamicCache"
            )

    def _causal(self, query: Tensor, mask: Any) -> Any:
        """The mask, made where several new tokens came without one: they see the past and not each other's future."""
        length = query.shape[2]
        if mask is not None:
            return mask[..., : self.seen]
        if length == 1:
            return None
        columns = torch.arange(self.seen, device=query.device)
        return (columns <= columns[self.seen - length :, None])[None, None]

    def _light_mask(self, mask: Any, groups: int) -> Any:
        """The columns of a mask at the positions that light heads keep."""
        split = self.split
        if split is None or (mask is None and not split.has_empty):
            return mask
        positions = split.all_positions(self.seen)
        b, m = positions.shape[:2]
        held = (positions >= 0).repeat_interleave(groups, 1)[:, :, None]
        if mask is None:
            return held
        index = positions.clamp_min(0)
        if mask.shape[1] > 1:
            index = index.repeat_interleave(groups, 1)
        t = mask.shape[2]
        taken = mask.expand(b, index.shape[1], t, -1).gather(3, index[:, :, None].expand(-1, -1, t, -1))
        if taken.shape[1] == m and groups > 1 and mask.shape[1] == 1:
            taken = taken.repeat_interleave(groups, 1)
        if not split.has_empty:
            return taken
        if taken.dtype == torch.bool:
            return taken & held
        return taken.masked_fill(~held, torch.finfo(taken.dtype).min)

    def held_positions(self) -> Bool[Tensor, "b n s"]:
        """Which positions each key head holds."""
        source = self.all if self.split is None else (self.full or self.light)
        if source is None:
            raise ValueError("HeadBudgetCache: it holds nothing yet; read a text with it first")
        if self.split is None:
            b, n = source.keys.shape[:2]
            return torch.ones(b, n, self.seen, dtype=torch.bool, device=source.keys.device)
        split = self.split
        b, n = split.order.shape
        held = torch.ones(b, n, self.seen + 1, dtype=torch.bool, device=split.order.device)
        held[:, split.full :, : split.end] = False
        index = split.positions.masked_fill(split.positions < 0, self.seen)  # a column that is cut off
        held[:, split.full :].scatter_(2, index, True)
        return split.unsort(held[..., :-1], 1)

    def expanded(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, shapes_only: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Keys and values of all positions, 0 where a head holds none, and the mask that hides these.

        shapes_only: the numbers do not matter; nothing is copied.
        """
        if self.all is not None:
            if self.all.length == key.shape[2]:
                return key, value, mask
            return self.all.keys, self.all.values, self._causal(query, mask)
        if shapes_only:
            blank = [x[:, :, :1].expand(-1, -1, self.seen, -1) for x in (key, value)]
            return blank[0], blank[1], mask
        held, split = self.held_positions(), self.split
        if split is None:
            raise RuntimeError("HeadBudgetCache: it holds nothing yet")
        found = []
        for name, fresh in (("keys", key), ("values", value)):
            whole = fresh.new_zeros(*held.shape[:2], self.seen + 1, fresh.shape[-1])
            if self.full is not None:
                whole[:, : split.full, :-1] = getattr(self.full, name)
            if self.light is not None:
                positions = split.all_positions(self.seen)
                index = positions.masked_fill(positions < 0, self.seen)[..., None].expand(-1, -1, -1, fresh.shape[-1])
                whole[:, split.full :].scatter_(2, index, getattr(self.light, name))
            found.append(split.unsort(whole[:, :, :-1], 1))
        seen = held[:, :, None].repeat_interleave(query.shape[1] // held.shape[1], 1)
        base = self._causal(query, mask)
        if base is None:
            return found[0], found[1], seen
        if base.dtype == torch.bool:
            return found[0], found[1], base & seen
        return found[0], found[1], base.masked_fill(~seen, torch.finfo(base.dtype).min)

    # What it takes

    def fork(self, policy: BudgetPolicy) -> "HeadBudgetLayer":
        """A layer of a cache of another policy with the same prompt, of which nothing was dropped."""
        module = self.module()
        if module is None or self.split is not None:
            raise ValueError("fork: the cache was compressed already; read the prompt with chunked=True and fork then")
        known = 0 if self.observed is None else self.observed[0].shape[2]
        if known < min(policy.window, self.seen):
            raise ValueError(
                f"fork: the policy looks at {policy.window} queries but {known} are known; make the cache with a "
                "policy of a larger window"
            )
        new = HeadBudgetLayer(policy, module, self.number, self.layers, chunked=self.chunked, said=self.said)
        new.is_initialized, new.seen, new.batch = self.is_initialized, self.seen, self.batch
        if self.all is not None and self.observed is not None:
            new.device, new.all = self.device, self.all.share()
            query, real, scale, softcap = self.observed
            new.observed = (query[:, :, -policy.window :], real, scale, softcap)
        return new

    def rectangles(self) -> list[Rectangle]:
        return [one for one in (self.all, self.full, self.light) if one is not None]

    # Rows of the batch, and going back

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch is not None:
            self._rows(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.batch is not None:
            picked = torch.arange(self.batch, device=indices.device)[indices]  # a boolean mask selects as well
            self._rows(picked)

    def _rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        index = index.to(self.device)
        for rectangle in self.rectangles():
            rectangle.rows(index)
        if self.split is not None:
            self.split = self.split.rows(index)
        if self.observed is not None:
            query, real, scale, softcap = self.observed
            real = None if real is None else real.index_select(0, index)
            self.observed = (query.index_select(0, index), real, scale, softcap)
        self.batch = len(index)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: 0 or a negative number.

        Raises ValueError for tokens of a compressed prompt, and while a prompt is read in chunks.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"HeadBudgetCache: crop({tokens_to_remove}): expected 0 or a negative number, the tokens to remove"
            )
        count = -tokens_to_remove
        if count and self.observed is not None:
            raise ValueError("HeadBudgetCache: crop() in the middle of a prompt; call finish_prefill() first")
        held = 0 if self.split is None else self.split.end
        if count > self.seen - held:
            raise ValueError(
                f"HeadBudgetCache: crop({tokens_to_remove}) reaches into the {held} tokens of the compressed prompt; "
                f"only the {self.seen - held} tokens after it can be removed"
            )
        if count:
            for rectangle in self.rectangles():
                rectangle.length -= count
            self.seen -= count
