"""Running prompts with nodes replaced, many variants of them in one forward: the engine of `patching` and `circuits`.

Three ways to run give the same numbers; each is taken where it is exact:
    full     the whole sequence;
    cached   the last token on the prompt's own cache: where only the last position is patched and read;
    frozen   the last token alone, without a cache: where every head is frozen too, so that attention is not asked.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.call import Call
from headwise.attend.edit import InputEdit
from headwise.errors import UnsupportedModel
from headwise.heads.decoding import arguments, embedding_device
from headwise.heads.effects import Receiver
from headwise.hf.addresses import layout, tower_kinds, unwrap
from headwise.hf.inputs import cache_of, takes, vocabulary_size, with_cache
from headwise.hf.session import steer
from headwise.hf.sites import Sites, find_sites, replace
from headwise.hf.steps import CACHE_NAMES

Inputs = Int[Tensor, "_ _"] | Mapping[str, Any]  # axes without names: that two inputs correspond is checked here
Way = Literal["full", "cached", "frozen"]
Group = tuple[Sequence[Head], Sequence[int]]  # heads, and layers of MLPs, that are patched together
LOGITS = 2**26  # numbers of one forward's logits


@dataclass(frozen=True)
class Prompts:
    """Clean and corrupt prompts of one shape; padding, where there is any, on the left and in the same places."""

    clean: Int[Tensor, "b t"]
    corrupt: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]

    @classmethod
    def of(cls, where: str, model: nn.Module, clean: Inputs, corrupt: Inputs) -> "Prompts":
        """Check what a caller gave. Raises ValueError for prompts that do not correspond token by token."""
        check_decoder(where, model)
        device = embedding_device(model)
        (one, real), (other, real_other) = (
            tokens(where, name, given) for name, given in (("clean", clean), ("corrupt", corrupt))
        )
        if one.shape != other.shape:
            raise ValueError(
                f"{where}: clean is {tuple(one.shape)} but corrupt is {tuple(other.shape)}; every prompt needs a "
                "counterpart of the same length, so that their positions correspond"
            )
        if not torch.equal(real, real_other):
            raise ValueError(f"{where}: clean and corrupt are padded in different places; pad both alike")
        size = vocabulary_size(model)
        for name, ids in (("clean", one), ("corrupt", other)):
            if int(ids.min()) < 0 or int(ids.max()) >= size:
                span = f"{int(ids.min())} to {int(ids.max())}"
                raise ValueError(f"{where}: {name} has ids from {span}; the model knows 0 to {size - 1}")
        return cls(one.to(device), other.to(device), real.to(device))


def tokens(where: str, name: str, given: Inputs) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Ids and which of them are real, from ids alone or from what a tokenizer returned."""
    if not isinstance(given, Tensor):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{where}: {name} is {type(given).__name__}; give token ids [b, t], or a tokenizer's output"
            )
        unknown = set(given) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in given:
            raise ValueError(
                f"{where}: {name} has {', '.join(map(str, given))}; only input_ids and attention_mask can be patched"
            )
    ids = torch.as_tensor(given if isinstance(given, Tensor) else given["input_ids"])
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"{where}: {name} has shape {tuple(ids.shape)} of {ids.dtype}; expected token ids [b, t]")
    mask = None if isinstance(given, Tensor) else given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    if real.shape != ids.shape:
        raise ValueError(f"{where}: the mask of {name} is {tuple(real.shape)} for ids {tuple(ids.shape)}")
    if not bool(real[:, -1].all()) or bool((real.int().diff(dim=1) < 0).any()):
        raise ValueError(
            f"{where}: {name} is padded on the right, where the last column is no prompt's last token; pad on the left"
        )
    return ids.long(), real


def check_decoder(where: str, model: nn.Module) -> None:
    """Refuse models that are not causal decoders with logits, and training mode."""
    inner, kinds = unwrap(model), tower_kinds(model)
    if inner.config.is_encoder_decoder or kinds.get("") != "causal" or inner.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{where}: {type(inner).__name__} is no causal decoder with a language-model head, such as those of "
            "AutoModelForCausalLM"
        )
    if model.training:
        raise ValueError(f"{where}: the model is in training mode; call model.eval() first")


@dataclass
class _Receivers(InputEdit):
    """Reads the queries, keys or values of heads in one run and writes them in the next.

    wanted: layer -> part -> heads. Of keys and values the whole group is named.
    """

    wanted: dict[int, dict[str, set[int]]] = field(default_factory=dict, kw_only=True)
    writing: bool = field(default=False, kw_only=True)
    seen: dict[int, dict[str, Tensor]] = field(default_factory=dict, kw_only=True)

    def change(self, call: Call) -> Call:
        parts = self.wanted[call.layer]
        if not self.writing:
            self.seen[call.layer] = {part: getattr(call, part).clone() for part in parts}
            return call
        values = {}
        for part, heads in parts.items():
            value = getattr(call, part).clone()
            index = [i for i, head in enumerate(call.heads) if head in heads]
            value[:, index] = self.seen[call.layer][part][:, index]
            values[part] = value
        return Call(**{**vars_of(call), **values, "memo": {}})


def vars_of(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in call.__dataclass_fields__}


@dataclass
class Values:
    """What nodes put out in one run, on the rows that are kept, and what the model said."""

    heads: dict[int, Tensor] = field(default_factory=dict)  # layer -> [b r h e]
    mlps: dict[int, Tensor] = field(default_factory=dict)  # layer -> [b r c]
    first: Tensor | None = None  # the embedding [b r c]
    final: Tensor | None = None  # the stream before the final norm [b 1 c]
    logits: Tensor | None = None  # [b v] at the metric's position

    def mean(self) -> "Values":
        """The means over prompts, position by position."""

        def over(table: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: value.mean(0, keepdim=True).expand_as(value) for layer, value in table.items()}

        return Values(over(self.heads), over(self.mlps))


class Runs:
    """A model whose nodes are watched and replaced; use it as a context, and `run` inside it.

    position: where nodes are patched: None for everywhere, a column, or a column of each prompt. at: the column whose
    logits are read. freeze: "heads" and "mlps" hold these at their clean values everywhere.
    """

    def __init__(
        self,
        where: str,
        model: nn.Module,
        prompts: Prompts,
        *,
        position: int | Tensor | None,
        at: int,
        freeze: Sequence[str] = (),
        receivers: Sequence[Receiver] = (),
        one_by_one: bool = False,
        batch_tokens: int = 16384,
    ) -> None:
        self.where, self.model, self.prompts = where, model, prompts
        self.layout: Layout = layout(model)
        self.sites: Sites = find_sites(model)
        b, t = prompts.clean.shape
        self.at = _column(where, "position_of_metric", at, t)
        self.columns = _columns(where, position, b, t)
        self.freeze, self.receivers = tuple(freeze), list(receivers)
        self.one_by_one, self.batch_tokens = one_by_one, batch_tokens
        self.attending = [layer for layer, heads in enumerate(self.layout.main.heads) if heads]
        writes = self.sites.writes()
        self.feeding = [site.layer for site in writes if site.kind == "mlp" and site.layer is not None]
        known = {(site.kind, site.layer) for site in self.sites.all()}
        if missing := [layer for layer in self.attending if ("heads", layer) not in known]:
            raise UnsupportedModel(
                f"{where}: {type(unwrap(model)).__name__}: the projection that mixes the heads of layer {missing[0]} "
                "was not found, so their outputs cannot be replaced"
            )
        self.way: Way = self._way(any(site.kind in ("mixer", "cross") for site in writes))
        self.clean = self.corrupt = Values()
        self._plan: list[Group] | None = None
        self._caught: dict[int, Tensor] = {}
        self._watch: Values | None = None
        self._phase: Literal["watch", "patch", "receive"] = "watch"
        self._final: Tensor | None = None
        self._cache: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> "Runs":
        self._stack.enter_context(torch.no_grad())
        self._inputs = self._receiving()
        if self._inputs is not None:
            self._stack.enter_context(steer(self.model, self._inputs))
        acts: dict[str, Any] = {f"heads:{layer}": partial(self._heads, layer) for layer in self.attending}
        acts |= {f"mlp:{layer}": partial(self._mlp, layer) for layer in self.feeding}
        acts |= {"residual:0": self._first, "final": self._last}
        self._stack.enter_context(replace(self.model, acts))
        self.clean = self._observe(self.prompts.clean)
        self.corrupt = self._observe(self.prompts.corrupt)
        if self.way != "full" and not self._agrees():
            self.way = "full"
            self.clean, self.corrupt = self._observe(self.prompts.clean), self._observe(self.prompts.corrupt)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._cache = None
        self._stack.__exit__(*exception)

    def run(self, groups: Sequence[Group], values: Values | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Patch each group of nodes in a variant of its own: start of the chunk, logits `[n b v]`, finals `[n b c]`.

        values: what takes the nodes' place; None means the corrupt run's. A group without nodes is the clean prompt,
        run the same way.
        """
        self._values = self.corrupt if values is None else values
        size = self._chunk()
        for start in range(0, len(groups), size):
            yield start, *self._variants(list(groups[start : start + size]))

    def changed(self, group: Group) -> Bool[Tensor, " b"]:
        """For which prompts any node of a group has another value in the corrupt run."""
        found = torch.zeros(len(self.prompts.clean), dtype=torch.bool)
        heads, mlps = group
        pairs = [(self.clean.heads[h.layer][:, :, h.head], self.corrupt.heads[h.layer][:, :, h.head]) for h in heads]
        pairs += [(self.clean.mlps[layer], self.corrupt.mlps[layer]) for layer in mlps]
        for one, other in pairs:
            differs = (one != other).any(-1)
            if self._mask is not None:
                differs = differs & self._mask.to(differs.device)
            found |= differs.any(-1).cpu()
        return found

    # How to run

    def _way(self, remembers: bool) -> Way:
        t = self.prompts.clean.shape[1]
        last = self.at == t - 1 and isinstance(self.columns, int) and self.columns == t - 1
        if self.one_by_one or not last or t == 1 or remembers:
            return "full"
        if "heads" in self.freeze and not self.receivers:
            return "frozen"
        return "cached" if any(takes(self.model, name) for name in CACHE_NAMES) else "full"

    def _agrees(self) -> bool:
        """The shorter way gives the clean prompt's own logits: true unless a family keeps state of its own."""
        clean = self.clean.logits
        self._values = self.corrupt
        try:
            logits, _ = self._variants([((), ())])
        except (ValueError, IndexError, RuntimeError):
            return False
        assert clean is not None
        bound = 1e-3 if clean.dtype in (torch.float32, torch.float64) else 0.1
        return bool((logits[0] - clean).float().norm() <= bound * clean.float().norm())

    def _chunk(self) -> int:
        if self.one_by_one:
            return 1
        b, t = self.prompts.clean.shape
        rows = b if self.way == "frozen" else b * t
        return max(1, min(self.batch_tokens // rows, LOGITS // (b * vocabulary_size(self.model))))

    @property
    def _mask(self) -> Tensor | None:
        """`[b, r]` which of the kept rows are patched; None means all of them."""
        if self.columns is None or self.way != "full":
            return None
        b, t = self.prompts.clean.shape
        column = torch.as_tensor(self.columns, device=self.prompts.clean.device)
        return (torch.arange(t, device=column.device) == column.view(-1, 1)).expand(b, t)

    # One forward

    def _observe(self, ids: Tensor) -> Values:
        self._phase, self._watch = "watch", Values()
        given = arguments(self.model, ids, self.prompts.real) | self._frugal()
        self._watch.logits = self._read(self.model(**given).logits)
        found, self._watch = self._watch, None
        return found

    def _variants(self, groups: list[Group]) -> tuple[Tensor, Tensor | None]:
        self._plan, self._phase, self._final = groups, "patch", None
        if self._inputs is not None:
            self._inputs.writing = False
        logits = self._forward(len(groups))
        if self.receivers:
            self._phase = "receive"
            if self._inputs is not None:
                self._inputs.writing = True
            logits = self._forward(len(groups))
            if self._inputs is not None:
                self._inputs.writing = False
        b = len(self.prompts.clean)
        final = None if self._final is None else self._final[:, -1].unflatten(0, (-1, b))
        return logits.unflatten(0, (-1, b)), final

    def _forward(self, n: int) -> Tensor:
        ids, real = self.prompts.clean.repeat(n, 1), self.prompts.real.repeat(n, 1)
        if self.way == "full":
            return self._read(self.model(**arguments(self.model, ids, real), **self._frugal()).logits)
        if self.way == "frozen":
            return self.model(input_ids=ids[:, -1:], use_cache=False).logits[:, -1]
        given = arguments(self.model, ids[:, -1:], real) | with_cache(self.model, self._prompt_cache(n))
        return self.model(**given).logits[:, -1]

    def _frugal(self) -> dict[str, Any]:
        given: dict[str, Any] = {"use_cache": False} if takes(unwrap(self.model), "use_cache") else {}
        if self.at == self.prompts.clean.shape[1] - 1 and takes(unwrap(self.model), "logits_to_keep"):
            given["logits_to_keep"] = 1
        return given

    def _read(self, logits: Tensor) -> Tensor:
        return logits[:, -1] if logits.shape[1] == 1 else logits[:, self.at]

    def _prompt_cache(self, n: int) -> Any:
        """The clean prompt's cache without its last token, once for each of n variants."""
        if self._cache is None:
            phase, self._phase, watch = self._phase, "watch", self._watch
            self._watch = Values()
            real = self.prompts.real[:, :-1]
            given = arguments(self.model, self.prompts.clean[:, :-1], real)
            if takes(unwrap(self.model), "logits_to_keep"):
                given["logits_to_keep"] = 1
            self._cache = cache_of(self.model(**given, use_cache=True))
            self._phase, self._watch = phase, watch
        cache = deepcopy(self._cache)
        # Variants are the outer axis: v0 of all prompts, then v1 of all prompts.
        order = torch.arange(len(self.prompts.clean), device=self.prompts.clean.device).repeat(n)
        cache.batch_select_indices(order)
        return cache

    # What happens at the sites

    def _heads(self, layer: int, value: Tensor) -> Tensor:
        if self._phase == "watch":
            self._seen.heads[layer] = self._rows(value)
            return value
        if self._phase == "receive":
            return value
        assert self._plan is not None
        picked = [(i, h.head) for i, (heads, _) in enumerate(self._plan) for h in heads if h.layer == layer]
        frozen = "heads" in self.freeze
        if not picked and not frozen:
            return value
        new = self._variants_of(self.clean.heads[layer] if frozen else value, frozen)
        if picked:
            variants, heads = (torch.tensor(index, device=new.device) for index in zip(*picked, strict=True))
            other = self._values.heads[layer].permute(2, 0, 1, 3)[heads]  # [k b r e]
            mask = self._mask
            if mask is not None:
                other = torch.where(mask[None, :, :, None], other, new[variants, :, :, heads])
            new[variants, :, :, heads] = other
        return new.flatten(0, 1)

    def _mlp(self, layer: int, value: Tensor) -> Tensor:
        if self._phase == "watch":
            self._seen.mlps[layer] = self._rows(value)
            return value
        receives = any(receiver.part == "mlp" and receiver.layer == layer for receiver in self.receivers)
        if self._phase == "receive":
            return self._caught[layer] if receives else value
        assert self._plan is not None
        picked = [i for i, (_, mlps) in enumerate(self._plan) if layer in mlps]
        frozen = "mlps" in self.freeze and not receives
        if receives:
            self._caught[layer] = value.clone()
        if not picked and not frozen:
            return value
        new = self._variants_of(self.clean.mlps[layer] if frozen else value, frozen)
        if picked:
            mask = self._mask
            other = self._values.mlps[layer]
            if mask is not None:
                new[picked] = torch.where(mask[None, :, :, None], other, new[picked])
            else:
                new[picked] = other
        return new.flatten(0, 1)

    def _first(self, value: Tensor) -> Tensor:
        if self._phase == "watch":
            self._seen.first = self._rows(value)
        elif self.way == "frozen":  # the embedding with its position, whatever position a lone token would get
            assert self._plan is not None and self.clean.first is not None
            return self._variants_of(self.clean.first, True).flatten(0, 1)
        return value

    def _last(self, value: Tensor) -> Tensor:
        row = value[:, self.at if value.shape[1] > self.at else -1][:, None].clone()
        if self._phase == "watch":
            self._seen.final = row
        else:
            self._final = row
        return value

    @property
    def _seen(self) -> Values:
        assert self._watch is not None
        return self._watch

    def _rows(self, value: Tensor) -> Tensor:
        return value.clone() if self.way == "full" else value[:, -1:].clone()

    def _variants_of(self, value: Tensor, one: bool) -> Tensor:
        """`[n b r ..]`, a copy. one: the value is that of the prompts, the same for all variants."""
        assert self._plan is not None
        if one:
            return value.expand(len(self._plan), *value.shape).clone()
        return value.unflatten(0, (len(self._plan), -1)).clone()

    def _receiving(self) -> _Receivers | None:
        wanted: dict[int, dict[str, set[int]]] = {}
        named: dict[Head, None] = {}
        for receiver in self.receivers:
            if receiver.head is None:
                continue
            head = self.layout.check(receiver.head)
            group = [head] if receiver.part == "q" else [h for h in self.layout.heads() if same_group(h, head)]
            parts = wanted.setdefault(head.layer, {})
            parts.setdefault(receiver.part, set()).update(other.head for other in group)
            named.update(dict.fromkeys(group))
        return _Receivers(heads=list(named), wanted=wanted) if named else None


def same_group(one: Head, other: Head) -> bool:
    """Whether two heads of a layout read the same key head."""
    return (one.layer, one.key) == (other.layer, other.key)


def _column(where: str, name: str, given: int, t: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not -t <= given < t:
        raise ValueError(f"{where}: {name} is {given!r}; the prompts have columns 0 to {t - 1} (-1 is the last)")
    return given % t


def _columns(where: str, position: int | Tensor | None, b: int, t: int) -> int | Tensor | None:
    if position is None:
        return None
    if not isinstance(position, Tensor):
        return _column(where, "position", position, t)
    if position.shape != (b,) or position.is_floating_point():
        raise ValueError(
            f"{where}: position has shape {tuple(position.shape)}; give one column for each of {b} prompts"
        )
    for given in position.tolist():
        _column(where, "position", given, t)
    return position % t
