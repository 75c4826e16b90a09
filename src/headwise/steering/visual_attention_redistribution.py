"""Visual attention redistribution (VAR): take attention from sinks and give it to the other image tokens.

    S = {t : max_j |x_tj| / RMS(x_t) > tau},  x the input of the layer;  I the image tokens,  V = S & I
    rows:   r = sum_{I - V} a / sum_I a >= rho  and  sum_I a >= m,  after the image, with V not empty
    there:  a_k <- (1 - p) a_k for k in S;  a_k <- a_k (1 + p sum_S a / sum_{I - V} a) for k in I - V

Rows still sum to 1. No training, no second pass: sinks are found while the prompt is read and kept while tokens are
generated.

Paper: headwise/papers/visual_attention_redistribution.py (Kang et al., ICLR 2025).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout, pick_layers
from headwise.attend.call import Call
from headwise.attend.edit import Edit, GroupEdit
from headwise.attend.groups import KeyGroup, image_tokens, spans
from headwise.attend.step import Step
from headwise.heads.sinks import check_dims, massive_values, warn_unreachable
from headwise.hf.addresses import layout, unwrap
from headwise.hf.sites import replace
from headwise.ops.softmax import log_sum_exp
from headwise.steering._images import (
    Layers,
    carry,
    check_layers,
    heads_in_layers,
    needs_image_token,
    rows_after,
)

__all__ = ["VisualAttentionRedistribution", "image_centric_rows", "redistribute_attention", "visual_non_sink_ratio"]

EPSILON = 1e-6  # for every image token, in the denominator of the share, as in the authors' code


@dataclass
class VisualAttentionRedistribution(Edit):
    """Move a share of the attention on sinks to the other image tokens, in heads that look at the image.

    transfer: the share that is moved, 0..1; 0 changes nothing. non_sink_ratio: a row counts as image-centric where
    at least this share of its attention on the image lies on other tokens than sinks, 0..1. min_image_mass: and at
    least so much of its attention on the image, 0..1. sink_threshold: of max |x| / RMS(x), 0 or more. sink_dims: the
    dimensions to look at (`heads.find_sink_dims`, `heads.sink_dims_of`); None is all. layers: a slice or numbers.
    image: the image tokens. sinks: these and no others, instead of looking for massive activations (for one, the
    `group()` of what `heads.find_sinks` found).

    Only text after an image is changed. A prompt without an image, or in which no image token is a sink, leaves the
    model as it is bit for bit; where that is all that happens between opening and closing, a warning says so.

    Notes: the authors' code moves 0.4 (its p = 0.6 is what stays), the paper says a fraction p is moved: transfer 0.4
    is the code, 0.6 the text. Its rho bounds the share of sinks from above, non_sink_ratio 1 - rho is the same rule.
    It means to skip the last layer and does not (`layers=slice(2, None)`). Between two images, text is changed with the
    image tokens and sinks that it has seen.

    >>> VisualAttentionRedistribution(transfer=0.0).neutral
    True
    """

    transfer: float = 0.6
    non_sink_ratio: float = 0.5
    min_image_mass: float = 0.2
    sink_threshold: float = 20.0
    sink_dims: Sequence[int] | None = None
    layers: Layers = field(default_factory=lambda: slice(2, -1))
    image: KeyGroup = field(default_factory=image_tokens)
    sinks: KeyGroup | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transfer", "non_sink_ratio", "min_image_mass"):
            _check_share("VisualAttentionRedistribution", name, getattr(self, name))
        if not self.sink_threshold >= 0:
            raise ValueError(
                f"VisualAttentionRedistribution: sink_threshold is {self.sink_threshold}; it must be 0 or more"
            )
        for name in ("image", "sinks"):
            group = getattr(self, name)
            if not isinstance(group, KeyGroup) and not (name == "sinks" and group is None):
                raise TypeError(f"VisualAttentionRedistribution: {name} is {type(group).__name__}; give a key group")
        check_layers("VisualAttentionRedistribution", self.layers)
        self.sink_dims = None if self.sink_dims is None else tuple(int(dim) for dim in self.sink_dims)

    @staticmethod
    def example() -> "VisualAttentionRedistribution":
        """One that acts in a text model: tokens 1 to 5 stand for an image, two of them for its sinks."""
        return VisualAttentionRedistribution(
            transfer=0.9,
            non_sink_ratio=0.0,
            min_image_mass=0.0,
            layers=slice(None),
            image=spans([(1, 6)]),
            sinks=spans([(2, 4)]),
            heads=["0.1", "1.2"],
        )

    @property
    def neutral(self) -> bool:
        return self.transfer == 0

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return (self.image,) if self.sinks is None else (self.image, self.sinks)

    def primitives(self) -> tuple[Edit, ...]:
        return (_Redistribute(self, heads=self.heads, when=self.when),)


@dataclass(eq=False)
class _Redistribute(GroupEdit):
    """The edit at work on one model; what it finds out about a sequence lies in `Step.carried`."""

    of: VisualAttentionRedistribution
    looked: bool = field(default=False, init=False)  # at a prompt with an image
    moved: bool = field(default=False, init=False)  # a sink was found among its tokens
    largest: Tensor | None = field(default=None, init=False)
    _groups: dict[int, KeyGroup] = field(default_factory=dict, init=False)
    _latest: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = field(default=None, init=False)

    @property
    def neutral(self) -> bool:
        return self.of.neutral

    def named(self, layout: Layout, scores: Callable[[str], Mapping[Head, float | None]] | None = None) -> list[Head]:
        return heads_in_layers(type(self.of).__name__, self.heads, self.of.layers, layout, scores)

    def watch(self, model: nn.Module, step: Callable[[], Step | None]) -> Iterable[Callable[[], Any]]:
        needs_image_token(model, self.of.image)
        if self.of.sinks is not None:
            return (self._report,)
        name = type(self.of).__name__
        embedding: Any = unwrap(model).get_input_embeddings()
        width = int(embedding.weight.shape[1])
        if self.of.sink_dims is not None:
            check_dims(name, self.of.sink_dims, width)
        warn_unreachable(name, self.of.sink_threshold, width, "sink_threshold")
        chosen = pick_layers(self.of.layers, layout(model).main.layers, name)
        with ExitStack() as hung:
            for layer in chosen:
                hung.enter_context(replace(model, {f"residual:{layer}": partial(self._look, step, layer)}))
            return (hung.pop_all().close, self._report)

    def _look(self, current: Callable[[], Step | None], layer: int, x: Tensor) -> Tensor:
        """Find the sinks of a layer from its input `[b t c]`, while a prompt is read."""
        step = current()
        if step is not None and not step.generating and x.shape[:2] == (step.real.shape[0], step.length):
            value = massive_values(x.detach(), self.of.sink_dims)
            carry(step, (self.serial, layer), value > self.of.sink_threshold)
            image = self.of.image.members(step)[:, step.past :].to(value)
            shown = (value * image).amax()
            self.largest = shown if self.largest is None else torch.maximum(self.largest, shown.to(self.largest))
        return x

    def _report(self) -> None:
        if not self.looked or self.moved:
            return
        largest = (
            "" if self.largest is None else f" (the largest of its max |x| / RMS(x) was {float(self.largest):.1f})"
        )
        rule = "is in sinks" if self.of.sinks is not None else f"passes sink_threshold {self.of.sink_threshold:g}"
        warnings.warn(
            f"VisualAttentionRedistribution: no image token {rule}{largest}, so attention was left as it is",
            stacklevel=5,
        )

    # The rule

    def key_groups(self) -> tuple[KeyGroup, ...]:
        return self.of.key_groups()

    def groups(self, call: Call) -> tuple[KeyGroup, ...]:
        if self.of.sinks is not None:
            return (self.of.sinks, self.of.image)
        if call.layer not in self._groups:
            self._groups[call.layer] = KeyGroup(f"massive:{call.layer}", partial(self._found, call.layer), settled=True)
        return (self._groups[call.layer], self.of.image)

    def _found(self, layer: int, step: Step) -> Tensor:
        known = step.carried.get((self.serial, layer))
        if known is None or known.shape != step.real.shape:
            known = carry(step, (self.serial, layer), None)
        return known.to(step.real.device)

    def rows(self, call: Call) -> bool | Tensor:
        when = super().rows(call)
        return False if when is False else self._touched(call, when)

    def _touched(self, call: Call, when: bool | Tensor) -> bool | Tensor:
        step, layer = call.key_step, call.layer
        known, groups = ("sinks", self.serial, layer), self.groups(call)

        def touched() -> bool | Tensor:
            some, every = step.carried.get(known, (None, None)) if step.generating else (None, None)
            if some is False:
                return False
            if every and step.length == 1 and all(group.settled for group in groups):
                return step.rows_real or step.real[:, step.past :]  # a generated token is text
            sinks, image = (group.members(step) for group in groups)
            visual = sinks & image
            if some is None:  # asked while the prompt is read only
                there = visual.any(-1)
                some, every = bool(there.any()), bool(there.all())
                self.looked = self.looked or some or bool(image.any())
                self.moved = self.moved or some
                step.carried[known] = some, every
            if not some:
                return False
            if step.length > 1:
                return (rows_after(image, step.real) & (visual.cumsum(-1) > 0))[:, step.past :]
            rows = (step.real & ~image)[:, step.past :] & visual.any(-1, keepdim=True)
            return bool(rows.all()) or rows

        rows = step.once(("rows", self.serial, groups), touched)
        if rows is False or when is True:
            return rows
        assert isinstance(when, Tensor)  # a part of the rows
        return when if rows is True else rows & when.to(call.q.device)

    def reweigh(self, log_mass: Tensor, inside: Tensor, call: Call) -> Tensor:
        parts, others, given = self._parts_of(inside, log_mass.dtype)
        log_sinks, log_visual, log_others = log_sum_exp(log_mass[..., None, :] + parts).unbind(-1)
        floor = self._floor(call.key_step, log_mass.dtype)
        centric = _centric(
            log_visual.exp(), log_others.exp(), floor, self.of.non_sink_ratio, self.of.min_image_mass
        ) & (log_others > -torch.inf)
        base = log_others.masked_fill(~centric, 0)
        gain = torch.logaddexp(base, log_sinks + math.log(self.of.transfer)) - base
        return torch.where(centric[..., None], log_mass + (gain[..., None] * others + given), log_mass)

    def _parts_of(self, inside: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of atoms: what leaves the sinks, the visual ones and the other image tokens of them `[3, a]`; which are such
        others, as 0 and 1; what sinks are multiplied with, as logarithms."""
        known = self._latest
        if known is None or known[0] is not inside or known[1][0].dtype != dtype:
            sinks, image = inside
            others = image & ~sinks
            zero = torch.zeros(inside.shape[1], dtype=dtype, device=inside.device)
            left = 1 - self.of.transfer
            parts = torch.stack([zero.masked_fill(~part, -torch.inf) for part in (sinks, sinks & image, others)])
            given = zero.masked_fill(sinks, math.log(left) if left else -torch.inf)
            known = self._latest = (inside, (parts, others.to(dtype), given))
        return known[1]

    def _floor(self, step: Step, dtype: torch.dtype) -> Tensor:
        """`[b 1 1]` what the denominator of the share gets for all image tokens."""
        image = self.of.image
        place = ("floor", image, dtype, str(step.device))
        known = step.carried.get(place) if step.generating and image.settled else step.cache.get(place)
        if known is None or len(known) != step.batch:
            known = EPSILON * image.members(step).sum(-1).view(-1, 1, 1).to(dtype)
            step.carried[place] = step.cache[place] = known
        return known


def visual_non_sink_ratio(
    weights: Float[Tensor, "b h q k"], sink_mask: Bool[Tensor, "b k"], image_mask: Bool[Tensor, "b k"]
) -> Float[Tensor, "b h q"]:
    """The share of a row's attention on the image that lies on other image tokens than sinks; 1 where it sees none."""
    image, visual = image_mask[:, None, None], (image_mask & sink_mask)[:, None, None]
    mass, on_sinks = (weights * image).sum(-1), (weights * visual).sum(-1)
    return 1 - on_sinks / (mass + EPSILON * image_mask.sum(-1).view(-1, 1, 1))


def image_centric_rows(
    weights: Float[Tensor, "b h q k"],
    sink_mask: Bool[Tensor, "b k"],
    image_mask: Bool[Tensor, "b k"],
    *,
    non_sink_ratio: float = 0.5,
    min_image_mass: float = 0.2,
) -> Bool[Tensor, "b h q"]:
    """Rows in which a head looks at the image and not mainly at its sinks; none where no image token is a sink."""
    _check_share("image_centric_rows", "non_sink_ratio", non_sink_ratio)
    _check_share("image_centric_rows", "min_image_mass", min_image_mass)
    image, visual = image_mask[:, None, None], (image_mask & sink_mask)[:, None, None]
    on_sinks, on_others = (weights * visual).sum(-1), (weights * (image & ~visual)).sum(-1)
    floor = EPSILON * image_mask.sum(-1).view(-1, 1, 1).to(weights)
    centric = _centric(on_sinks, on_others, floor, non_sink_ratio, min_image_mass)
    return centric & visual.any(-1)


def redistribute_attention(
    weights: Float[Tensor, "b h q k"],
    sink_mask: Bool[Tensor, "b k"],
    image_mask: Bool[Tensor, "b k"],
    *,
    transfer: float = 0.6,
    non_sink_ratio: float = 0.5,
    min_image_mass: float = 0.2,
    rows: Bool[Tensor, "b q"] | None = None,
) -> Float[Tensor, "b h q k"]:
    """The rule on weights that were formed. rows: those that may change (text after the image); None is all.

    sink_mask: text and visual sinks; image_mask: image tokens. Rows keep their sums; rows that are not image-centric,
    and rows whose image tokens are all sinks or hidden, stay as they are bit for bit.

    >>> redistribute_attention(torch.tensor([[[[0.4, 0.2, 0.3, 0.1]]]]), torch.tensor([[True, True, False, False]]),
    ...     torch.tensor([[False, True, True, False]]), transfer=0.5).tolist()[0][0][0]  # doctest: +ELLIPSIS
    [0.2..., 0.1..., 0.6..., 0.1...]
    """
    _check_share("redistribute_attention", "transfer", transfer)
    if transfer == 0:
        return weights
    work = weights.to(torch.promote_types(weights.dtype, torch.float32))
    centric = image_centric_rows(
        work, sink_mask, image_mask, non_sink_ratio=non_sink_ratio, min_image_mass=min_image_mass
    )
    centric = centric if rows is None else centric & rows[:, None]
    sinks, others = sink_mask[:, None, None], (image_mask & ~sink_mask)[:, None, None]
    budget, kept = transfer * (work * sinks).sum(-1), (work * others).sum(-1)
    centric = centric & (kept > 0)
    gain = 1 + budget / kept.masked_fill(~centric, 1)
    new = torch.where(sinks, work * (1 - transfer), torch.where(others, work * gain[..., None], work))
    return torch.where(centric[..., None], new, work).to(weights.dtype)


def _centric(
    on_sinks: Float[Tensor, "b h q"],
    on_others: Float[Tensor, "b h q"],
    floor: Float[Tensor, "b 1 1"],
    non_sink_ratio: float,
    min_image_mass: float,
) -> Bool[Tensor, "b h q"]:
    mass = on_sinks + on_others
    return (on_sinks / (mass + floor) <= 1 - non_sink_ratio) & (mass >= min_image_mass)


def _check_share(where: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{where}: {name} is {value}; it must lie in 0..1")
