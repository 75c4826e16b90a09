"""Imbalanced attention (PAINT): raise the scores of informed image tokens, head by head.

    z_k <- z_k + s_h alpha |z_k|  for local k,   z_k <- z_k + s_h beta |z_k|  for summary k,   then softmax

z are the scores as the softmax sees them; s_h is the factor of a head. In the last row of a prompt and in every
generated token, in layers 2 and up. Local and summary tokens are told by the vision tower (`heads.informed_tokens`).

Paper: headwise/papers/imbalanced_attention.py (Arif et al., 2025); PAI (Liu et al., ECCV 2024) is `ImageTokenBoost`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.attend.call import Call
from headwise.attend.edit import Edit, GroupEdit, RowEdit, Rows
from headwise.attend.groups import KeyGroup, image_tokens, over_columns, spans
from headwise.attend.read import Probe
from headwise.attend.step import Step
from headwise.errors import UnsupportedModel
from headwise.heads.vision_tokens import Rule, VisionTokenScores
from headwise.hf.addresses import unwrap
from headwise.hf.images import image_positions, without
from headwise.ops.softmax import log_sum_exp
from headwise.steering._images import (
    Layers,
    carry,
    check_layers,
    heads_in_layers,
    needs_image_token,
    rows_after,
)

__all__ = ["ImageTokenBoost", "ImbalancedAttention", "boost_scores", "image_guidance", "sensitivity_scale"]


@dataclass
class ImbalancedAttention(Edit):
    """Raise attention to the image tokens that the vision tower singles out.

    local, summary: how much the scores of local and of summary tokens are raised, 0 or more; both 0 change nothing.
    mode: "abs" adds local times |score|, as the paper does; "bias" adds the number itself, which does not depend on
    the offset that the scores of a row happen to have. head_scale: `[l, h]` factors, 0 or more, for instance from
    `sensitivity_scale`; None is 1. layers: a slice or numbers. queries: "last", the last row of every forward (the end
    of the prompt, then each generated token), or "text", all text after an image, for scoring given texts as if they
    had been generated. tokens: "informed" or "all" image tokens, the latter all local. local_ratio, local_layer,
    summary_layer, rule: how `heads.informed_tokens` chooses. local_group, summary_group: these tokens instead.
    image: the image tokens, for queries="text".

    A prompt without a picture stays as it is bit for bit. A prompt that is read in chunks has the last row of each
    chunk edited.

    Notes: with "abs" a score of 0 gets nothing and a very negative one the largest raise (-8 becomes -2.4 at 0.7); that
    is the authors' code. Head factors are in the paper's abstract and not in its code, which treats heads alike. The
    code takes the tokens of the first picture for the whole batch; here every picture has its own. Without a CLS token
    the attention that a token receives takes the place of the CLS row.

    >>> ImbalancedAttention(local=0.0, summary=0.0).neutral
    True
    """

    local: float = 0.7
    summary: float = 0.3
    mode: Literal["abs", "bias"] = "abs"
    head_scale: Tensor | None = None
    layers: Layers = field(default_factory=lambda: slice(2, None))
    queries: Literal["last", "text"] = "last"
    tokens: Literal["informed", "all"] = "informed"
    local_ratio: float = 0.25
    local_layer: int = 0
    summary_layer: int = -2
    rule: Rule = "auto"
    local_group: KeyGroup | None = None
    summary_group: KeyGroup | None = None
    image: KeyGroup = field(default_factory=image_tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        for name in ("local", "summary"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"{where}: {name} is {value}; it must be 0 or more (it raises attention, never lowers)"
                )
        if not 0 <= self.local_ratio <= 1:
            raise ValueError(f"{where}: local_ratio is {self.local_ratio}; it must lie in 0..1")
        choices = {
            "mode": ("abs", "bias"),
            "queries": ("last", "text"),
            "tokens": ("informed", "all"),
            "rule": ("auto", "cls", "received"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{where}: {name} is {getattr(self, name)!r}; choose {' or '.join(allowed)}")
        if self.head_scale is not None:
            scale = torch.as_tensor(self.head_scale)
            if scale.ndim != 2 or not bool((scale >= 0).all()):
                raise ValueError(f"{where}: head_scale of shape {tuple(scale.shape)}; give [layers, heads], 0 or more")
        check_layers(where, self.layers)

    @staticmethod
    def example() -> "ImbalancedAttention":
        """One that acts in a text model: tokens 1 to 5 stand for an image."""
        return ImbalancedAttention(
            local=0.9,
            summary=0.5,
            layers=slice(None),
            queries="text",
            local_group=spans([(1, 3)]),
            summary_group=spans([(4, 5)]),
            image=spans([(1, 6)]),
            heads=["0.1", "1.2"],
        )

    @property
    def neutral(self) -> bool:
        return self.local == 0 and self.summary == 0

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return tuple(group for group in (self.image, self.local_group, self.summary_group) if group is not None)

    def primitives(self) -> tuple[Edit, ...]:
        kind = _BoostScores if self.mode == "abs" else _BoostBias
        return (kind(of=self, heads=self.heads, when=self.when),)


@dataclass
class ImageTokenBoost(Edit):
    """Raise attention to all image tokens alike, by alpha times the absolute value of their scores (PAI).

    alpha: 0 or more; 0 changes nothing. mode, head_scale, layers, queries, image: as in `ImbalancedAttention`, of which
    this is the case where every image token is local.

    >>> ImageTokenBoost(alpha=0.0).neutral
    True
    """

    alpha: float = 0.5
    mode: Literal["abs", "bias"] = "abs"
    head_scale: Tensor | None = None
    layers: Layers = field(default_factory=lambda: slice(2, None))
    queries: Literal["last", "text"] = "last"
    image: KeyGroup = field(default_factory=image_tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ValueError(f"ImageTokenBoost: alpha is {self.alpha}; it must be 0 or more")
        self._general()

    @staticmethod
    def example() -> "ImageTokenBoost":
        """One that acts in a text model: tokens 1 to 5 stand for an image."""
        image = spans([(1, 6)])
        return ImageTokenBoost(0.9, layers=slice(None), queries="text", image=image, heads=["0.1", "1.2"])

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return (self.image,)

    def primitives(self) -> tuple[Edit, ...]:
        return self._general().primitives()

    def _general(self) -> ImbalancedAttention:
        names = ("mode", "head_scale", "layers", "queries", "image", "heads", "when")
        same: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ImbalancedAttention(local=self.alpha, summary=0.0, tokens="all", **same)


@dataclass(eq=False)
class _Boost(Edit):
    """What both modes share; what is found out about a sequence lies in `Step.carried`."""

    of: ImbalancedAttention
    reader: VisionTokenScores | None = field(default=None, init=False)

    @property
    def neutral(self) -> bool:
        return self.of.neutral

    @property
    def reads_pictures(self) -> bool:
        of = self.of
        return of.tokens == "informed" and of.local_group is None and of.summary_group is None

    def named(self, layout: Layout, scores: Callable[[str], Mapping[Head, float | None]] | None = None) -> list[Head]:
        scale = self.of.head_scale
        shape = (layout.main.layers, max(layout.main.heads))
        if scale is not None and tuple(torch.as_tensor(scale).shape) != shape:
            raise ValueError(
                f"ImbalancedAttention: head_scale is {list(torch.as_tensor(scale).shape)}, the model has {list(shape)} "
                "layers and heads"
            )
        return heads_in_layers("ImbalancedAttention", self.heads, self.of.layers, layout, scores)

    def watch(self, model: nn.Module, step: Callable[[], Step | None]) -> Iterable[Callable[[], Any]]:
        if self.reads_pictures or self.of.tokens == "all":
            needs_image_token(model, self.of.image)
        if not self.reads_pictures:
            return ()
        self.reader = VisionTokenScores(model, (self.of.local_layer, self.of.summary_layer), self.of.rule)
        return ()

    def probes(self) -> tuple[Probe, ...]:
        return () if self.reader is None else (self.reader,)

    @cached_property
    def sets(self) -> tuple[KeyGroup, KeyGroup]:
        """The local and the summary tokens."""
        settled = all(group.settled for group in self.of.key_groups()) or self.reads_pictures
        return tuple(
            KeyGroup(f"{name}:informed", partial(self._part, i), settled=settled)
            for i, name in enumerate(("local", "summary"))
        )  # pyright: ignore[reportReturnType]

    def _part(self, which: int, step: Step) -> Tensor:
        return self._found(step)[which]

    def _found(self, step: Step) -> tuple[Bool[Tensor, "b s"], Bool[Tensor, "b s"]]:
        return step.once(("informed", self.serial), lambda: self._find(step))

    def _find(self, step: Step) -> tuple[Tensor, Tensor]:
        of, nothing = self.of, torch.zeros_like(step.real)
        known = [step.carried.get((self.serial, i)) for i in range(2)]
        if known[0] is not None and known[1] is not None and known[0].shape == step.real.shape:
            return known[0].to(nothing.device), known[1].to(nothing.device)  # the same forward, on another device
        if of.tokens == "all":
            return of.image.members(step), nothing
        if self.reader is None:
            groups = (of.local_group, of.summary_group)
            local, summary = (nothing if group is None else group.members(step) for group in groups)
            return local & ~summary, summary
        found = (None, None)
        if not step.generating:
            found = self.reader.choose(of.image.members(step)[:, step.past :], of.local_ratio)
        local, summary = (carry(step, (self.serial, i), part) for i, part in enumerate(found))
        return local, summary

    def rows(self, call: Call) -> bool | Tensor:
        step = call.key_step
        if not step.generating:
            self._found(step)  # also where no row of a prompt is touched: generated ones will be
        when = super().rows(call)
        if when is False:
            return False
        known = ("boosted", self.serial)

        def touched() -> bool | Tensor:
            if step.generating and known in step.carried:  # decoding need not wait for the device
                some, every = step.carried[known]
            else:
                sets = self._found(step)
                there = (sets[0] | sets[1]).any(-1)
                some, every = bool(there.any()), bool(there.all())
                step.carried[known] = some, every
            if not some:
                return False
            if step.length == 1 and every and self.of.queries == "last":
                return True
            sets = self._found(step)
            there, real = (sets[0] | sets[1]).any(-1, keepdim=True), step.real[:, step.past :]
            if self.of.queries == "text":
                return there & rows_after(self.of.image.members(step), step.real)[:, step.past :]
            index = torch.arange(step.length, device=real.device)
            last = torch.where(real, index, -1).amax(-1, keepdim=True)
            return there & (index == last)

        rows = step.once(("rows", self.serial), touched)
        return rows & when.to(call.q.device) if isinstance(when, Tensor) and rows is not False else rows

    def strengths(self, call: Call) -> Float[Tensor, "2 h"]:
        """How much the scores of local and summary tokens are raised, for each head of a call."""
        base = torch.tensor([self.of.local, self.of.summary], dtype=call.work_dtype, device=call.q.device)[:, None]
        if self.of.head_scale is None:
            return base.expand(-1, len(call.heads))
        return base * torch.as_tensor(self.of.head_scale)[call.layer, call.heads].to(base)


@dataclass(eq=False)
class _BoostScores(_Boost, RowEdit):
    """z + s |z| on rows of weights."""

    any_rows: ClassVar[bool] = True

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return self.of.key_groups()

    def added(self, rows: Rows) -> Tensor:
        z, call = rows.scores, rows.call
        by_key = self._by_key(call)
        by_key = by_key if by_key.shape[-1] == z.shape[-1] else by_key[..., : z.shape[-1]]
        hidden = call.mask is not None or call.causal
        return by_key * (z.masked_fill(torch.isneginf(z), 0) if hidden else z).abs()

    def change(self, weights: Tensor, rows: Rows) -> Tensor:
        delta = self.added(rows).to(weights.dtype)
        top = delta.detach().masked_fill(weights <= 0, 0).amax(-1, keepdim=True)
        shifted = weights * (delta - top).clamp_max(0).exp()
        missing = 0.0 if rows.sink is None else rows.sink * (-top).exp()
        total = shifted.sum(-1, keepdim=True) + missing
        safe = total.clamp_min(torch.finfo(weights.dtype).tiny)
        if rows.sink is not None:
            rows.sink = torch.where(total > 0, missing / safe, rows.sink)
        return torch.where(total > 0, shifted / safe, weights)

    def _by_key(self, call: Call) -> Float[Tensor, "b h 1 s"]:
        """s alpha of local and s beta of summary keys, 0 of the others; `[b 1 1 s]` where heads are all alike."""
        layer = None if self.of.head_scale is None else (call.layer, *call.heads)

        def strength(members: Tensor) -> tuple[Tensor, None]:
            parts = self.strengths(call)[:, : 1 if layer is None else None, None, None]  # 2 h 1 1
            # Every key is in one of the sets at most.
            return (parts[:, None] * members[:, :, None, None].to(parts)).sum(0), None

        return over_columns(call, ("strength", self.serial, layer, call.work_dtype), self.sets, strength)[0]


@dataclass(eq=False)
class _BoostBias(_Boost, GroupEdit):
    """z + s: the masses of the two sets are multiplied by exp(s)."""

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return self.of.key_groups()

    def groups(self, call: Call) -> tuple[KeyGroup, ...]:
        return self.sets

    def constant(self, call: Call) -> list[Tensor | float] | None:
        return [self.of.local, self.of.summary] if self.of.head_scale is None else list(self.strengths(call))

    def reweigh(self, log_mass: Tensor, inside: Tensor, call: Call) -> Tensor:
        moved = log_mass
        for strength, members in zip(self.strengths(call), inside, strict=True):
            moved = torch.where(members, moved + strength.view(1, -1, 1, 1).to(log_mass), moved)
        total = log_sum_exp(moved, keepdim=True)
        return torch.where(torch.isneginf(total), log_mass, moved - total.masked_fill(torch.isneginf(total), 0))


def boost_scores(
    scores: Float[Tensor, "b h t s"],
    local: Bool[Tensor, "b s"],
    summary: Bool[Tensor, "b s"],
    *,
    alpha: float = 0.7,
    beta: float = 0.3,
    mode: Literal["abs", "bias"] = "abs",
    head_scale: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h t s"]:
    """The rule on scores before the softmax; hidden keys (-inf, or the most negative number of the dtype) stay so.

    >>> boost_scores(torch.tensor([[[[2.0, -8.0, 1.0]]]]), torch.tensor([[True, True, False]]),
    ...     torch.tensor([[False, False, True]]), alpha=0.5, beta=1.0)
    tensor([[[[ 3., -4.,  2.]]]])
    """
    if mode not in ("abs", "bias"):
        raise ValueError(f"boost_scores: mode is {mode!r}; choose abs or bias")
    if not (alpha >= 0 and beta >= 0):
        raise ValueError(f"boost_scores: alpha is {alpha} and beta {beta}; both must be 0 or more")
    strength = alpha * (local & ~summary).to(scores) + beta * summary.to(scores)  # b s
    strength = strength[:, None, None] * (1.0 if head_scale is None else head_scale.to(scores)[:, None, None])
    shown = scores > torch.finfo(scores.dtype).min / 2
    size = scores.masked_fill(~shown, 0).abs() if mode == "abs" else torch.ones_like(scores)
    return torch.where(shown, scores + strength * size, scores)


def sensitivity_scale(
    mass: Float[Tensor, "b l h"], *, prefer: Literal["sensitive", "insensitive"] = "sensitive"
) -> Float[Tensor, "l h"]:
    """Factors of heads in 0..1 from their attention on the image, for `ImbalancedAttention(head_scale=...)`.

    mass: what `heads.group_mass(model, inputs, {"image": image_tokens()})` gives of the last prompt row. It is averaged
    over inputs and stretched to 0..1 within each layer (a layer whose heads are all alike gets 1). prefer: whether
    heads that look at the image more, or less, are raised more.

    Notes: the paper's abstract names this step and its code leaves it out; the formula is reconstructed.

    >>> sensitivity_scale(torch.tensor([[[0.1, 0.3, 0.5]]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    if prefer not in ("sensitive", "insensitive"):
        raise ValueError(f"sensitivity_scale: prefer is {prefer!r}; choose sensitive or insensitive")
    mean = mass.nanmean(0)
    low = mean.nan_to_num(torch.inf).amin(-1, keepdim=True)
    high = mean.nan_to_num(-torch.inf).amax(-1, keepdim=True)
    flat = ~(high > low)
    scale = (mean - low) / (high - low).masked_fill(flat, 1)
    scale = scale if prefer == "sensitive" else 1 - scale
    return torch.where(flat, 1.0, scale).nan_to_num(1.0)


def image_guidance(model: nn.Module, inputs: Mapping[str, Any], scale: float = 1.1) -> dict[str, Any]:
    """Arguments of `generate` that contrast the prompt with the same prompt without its pictures.

    log p = scale (l - l0) + l0, l and l0 the log-softmax with and without pictures; 1 changes nothing. Edits of image
    tokens do nothing in the run without pictures. For greedy decoding and sampling. Raises UnsupportedModel for
    families that keep the positions of one sequence in the model (Qwen-VL), ValueError for scale below 1.

    Notes: PAI also cuts tokens that are implausible with the picture; that is not done here.
    """
    if not scale >= 1:
        raise ValueError(f"image_guidance: scale is {scale}; it must be 1 or more")
    inner = unwrap(model)
    if any(hasattr(module, "rope_deltas") for module in inner.modules()):
        raise UnsupportedModel(
            f"{type(inner).__name__}: it keeps the positions of its last prompt in the model, so two prompts cannot be "
            "decoded in turn; guidance needs another family, such as LLaVA"
        )
    twin = without(inputs, image_positions(model, inputs), model=model)
    mask = twin.get("attention_mask", torch.ones_like(twin["input_ids"]))
    return {
        "guidance_scale": float(scale),
        "negative_prompt_ids": twin["input_ids"],
        "negative_prompt_attention_mask": mask,
    }
