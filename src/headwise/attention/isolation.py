"""Isolation and reposition attention: subjects of a picture read their own references and not each other.

A target picture's tokens attend to the target's tokens and to those of one reference picture for each subject, in one
softmax. Of a reference only the subject's tokens are keys, and only for queries inside that subject in the target.
*Isolation* hides the tokens of the other subjects from a subject's queries. *Reposition* cuts the subject out of its
reference and lays it, resized, where the target has it.

Each subject's queries are gathered with their reference's keys, |T| x |R| pairs for each subject instead of a mask over
n x (s + 1) n, and merged with the target's own attention by log-sum-exp: no weights are formed. With five subjects that
cover a fifth of 960 tokens each this takes 2 times as long as the target alone, one call under a mask 8 times and
materialised scores 20 times (one CPU thread).

Paper: headwise/papers/isolation_reposition_attention.py (He et al., 2024).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.attend.kernels import attention_with_lse

__all__ = [
    "Overlap",
    "SubjectPart",
    "at_places",
    "isolation_mask",
    "read_references",
    "reference_attention",
    "reposition",
    "reposition_source",
    "subject_labels",
    "subject_parts",
]

Overlap = Literal["refuse", "neither", "later"]
Implementation = Literal["auto", "gathered", "masked"]


def _check_masks(where: str, name: str, masks: Tensor, dimensions: int) -> None:
    if masks.dtype != torch.bool:
        raise TypeError(f"{where}: {name} is {masks.dtype}; expected booleans, such as mask > 0.5")
    if masks.ndim != dimensions:
        raise ValueError(f"{where}: {name} has shape {tuple(masks.shape)}; expected {dimensions} dimensions")
    if dimensions == 3 and masks.shape[1] == 0:
        raise ValueError(f"{where}: {name} holds no subject (shape {tuple(masks.shape)}); give at least one")


def _settled(subject_masks: Tensor, overlap: str, where: str) -> Tensor:
    """The masks with no pixel in two of them, for isolation."""
    if overlap not in ("refuse", "neither", "later"):
        raise ValueError(f"{where}: overlap is {overlap!r}; choose 'refuse', 'neither' or 'later'")
    count = subject_masks.sum(1)
    if overlap == "refuse":
        if bool((count > 1).any()):
            raise ValueError(
                f"{where}: {int((count > 1).sum())} tokens lie in two subjects; give disjoint masks, or say to which "
                "subject they belong: overlap='later', or 'neither'"
            )
        return subject_masks
    if overlap == "neither":
        return subject_masks & (count == 1)[:, None]
    last = subject_masks.flip(1).cumsum(1).flip(1)  # how many subjects from this one on hold the token
    return subject_masks & (last == 1)


def subject_labels(subject_masks: Bool[Tensor, "b s n"], *, overlap: Overlap = "refuse") -> Int[Tensor, "b n"]:
    """Which subject each token belongs to: 0 is the background, 1 the first subject.

    overlap: what becomes of tokens in two subjects: they are refused, belong to neither, or to the later one.
    Raises TypeError for masks that are not boolean, ValueError for no subject and for refused overlaps.
    """
    _check_masks("subject_labels", "subject_masks", subject_masks, 3)
    settled = _settled(subject_masks, overlap, "subject_labels")
    number = torch.arange(1, subject_masks.shape[1] + 1, device=subject_masks.device)
    return (settled * number[:, None]).sum(1)


def isolation_mask(subject_masks: Bool[Tensor, "b s n"], *, overlap: Overlap = "refuse") -> Bool[Tensor, "b n n"]:
    """Which token may read which: all but those of another subject. The background reads and is read by everything.

    Subjects read themselves and the background, so that no row is empty.
    Raises as `subject_labels` does.

    >>> isolation_mask(torch.tensor([[[True, False, False], [False, False, True]]])).int().tolist()
    [[[1, 1, 0], [1, 1, 1], [0, 1, 1]]]
    """
    labels = subject_labels(subject_masks, overlap=overlap)
    row, column = labels[:, :, None], labels[:, None]
    return (row == column) | (row == 0) | (column == 0)


def _box(mask: Bool[Tensor, "b h w"], axis: int) -> tuple[Tensor, Tensor]:
    """First and last row (axis 1) or column (axis 2) with a set pixel; the last is inside. Of an empty mask 0, -1."""
    some = mask.any(3 - axis)
    length = some.shape[1]
    first = some.int().argmax(1)
    last = length - 1 - some.flip(1).int().argmax(1)
    return first, torch.where(some.any(1), last, -1)


def reposition_source(
    reference_mask: Bool[Tensor, "b n"], target_mask: Bool[Tensor, "b n"], size: tuple[int, int]
) -> Int[Tensor, "b n"]:
    """For each place of the canvas the reference token that comes to lie there, -1 where none does.

    The reference's box is resized to the target's by nearest neighbour, place y of th takes row floor(y rh / th), and
    only tokens of the subject are taken along. Boxes hold their last row and column. Where the target mask is empty the
    subject stays where it is.
    Raises ValueError for masks that do not fit each other or `size`, TypeError for masks that are not boolean.
    """
    where = "reposition_source"
    _check_masks(where, "reference_mask", reference_mask, 2)
    _check_masks(where, "target_mask", target_mask, 2)
    rows, columns = size
    if reference_mask.shape != target_mask.shape or reference_mask.shape[1] != rows * columns:
        raise ValueError(
            f"{where}: reference_mask has shape {tuple(reference_mask.shape)}, target_mask {tuple(target_mask.shape)}, "
            f"size is {size}; expected [b, {rows * columns}] for both"
        )
    own, target = (mask.unflatten(1, size) for mask in (reference_mask, target_mask))
    places = []
    for axis, length in ((1, rows), (2, columns)):
        first, last = _box(own, axis)
        start, end = _box(target, axis)
        place = torch.arange(length, device=own.device)
        source = (
            first[:, None]
            + (place - start[:, None]) * (last - first + 1)[:, None] // (end - start + 1).clamp_min(1)[:, None]
        )
        inside = (place >= start[:, None]) & (place <= end[:, None])
        places.append(torch.where(inside, source, -1))
    row, column = places[0][:, :, None], places[1][:, None]
    source = torch.where((row >= 0) & (column >= 0), row * columns + column, -1).flatten(1)
    stay = torch.arange(rows * columns, device=own.device)
    source = torch.where(target_mask.any(1, keepdim=True), source, stay)
    real = (source >= 0) & reference_mask.gather(1, source.clamp_min(0))
    return torch.where(real, source, -1)


def reposition(
    features: Float[Tensor, "b n c"],
    reference_mask: Bool[Tensor, "b n"],
    target_mask: Bool[Tensor, "b n"],
    size: tuple[int, int],
    mode: Literal["nearest", "bilinear"] = "nearest",
) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"]]:
    """Lay the subject of each reference where the target has it: features on a canvas of zeros, and the moved mask.

    features: of the reference's tokens, as `to_k` and `to_v` read them, on a grid of `size` rows and columns.
    mode: "nearest" resizes the box as the authors do; "bilinear" blends features of neighbouring tokens (the mask is
    always moved by nearest neighbour). Where the target mask is empty features and mask are kept as they are.
    Raises as `reposition_source` does, and ValueError for features of another number of tokens.

    Notes: in a network without rotary positions this resamples one set of keys: with boxes of equal size attention is
    the same as without, for it does not depend on the order of keys.

    >>> mask = torch.tensor([[True, False, False, False]])
    >>> moved, its = reposition(torch.tensor([[[7.0], [1.0], [1.0], [1.0]]]), mask, mask.flip(1), (2, 2))
    >>> moved.flatten().tolist(), its.flatten().tolist()
    ([0.0, 0.0, 0.0, 7.0], [False, False, False, True])
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"reposition: mode is {mode!r}; choose 'nearest' or 'bilinear'")
    if features.shape[:2] != reference_mask.shape:
        raise ValueError(
            f"reposition: features has shape {tuple(features.shape)} and reference_mask {tuple(reference_mask.shape)}; "
            "batch and tokens must match"
        )
    source = reposition_source(reference_mask, target_mask, size)
    moved = source >= 0
    taken = features.gather(1, source.clamp_min(0)[..., None].expand_as(features))
    nearest = taken.masked_fill(~moved[..., None], 0)
    keep = ~target_mask.any(1)
    if mode == "nearest":
        return torch.where(keep[:, None, None], features, nearest), moved
    made = []
    for item in range(len(features)):
        if bool(keep[item]) or not bool(reference_mask[item].any()):
            made.append(features[item] if bool(keep[item]) else torch.zeros_like(features[item]))
            continue
        own, target = (mask[item].unflatten(0, size)[None] for mask in (reference_mask, target_mask))
        (top, bottom), (left, right) = (map(int, _box(own, axis)) for axis in (1, 2))
        (up, down), (west, east) = (map(int, _box(target, axis)) for axis in (1, 2))
        grid = (features[item] * reference_mask[item][:, None]).unflatten(0, size).permute(2, 0, 1)
        box = grid[None, :, top : bottom + 1, left : right + 1]
        resized = F.interpolate(box, (down - up + 1, east - west + 1), mode="bilinear", align_corners=False)[0]
        margins = (west, size[1] - 1 - east, up, size[0] - 1 - down)
        made.append(F.pad(resized, margins).permute(1, 2, 0).flatten(0, 1))
    return torch.stack(made), moved


@dataclass(frozen=True)
class SubjectPart:
    """One subject's queries in the target and keys in its reference, as places; padded to the longest of the batch.

    subject: which one. rows: `[b r]` queries, rows_real which are no padding. keys: `[b k]` tokens of the reference,
    repeated where a box grew. places: `[b k]` where they come to lie on the canvas. keys_real: which are no padding,
    None where all are real.
    """

    subject: int
    rows: Int[Tensor, "b r"]
    rows_real: Bool[Tensor, "b r"]
    keys: Int[Tensor, "b k"]
    places: Int[Tensor, "b k"]
    keys_real: Bool[Tensor, "b k"] | None


def subject_parts(
    subject_masks: Bool[Tensor, "b s n"],
    reference_masks: Bool[Tensor, "b s m"],
    size: tuple[int, int] | None = None,
    *,
    queries: Bool[Tensor, "b s n"] | None = None,
    lay: Bool[Tensor, "b s n"] | None = None,
    offset: int = 0,
) -> list[SubjectPart]:
    """The parts that `read_references` reads, one for each subject that has both a query and a key.

    size: rows and columns of the tokens; where given, references are repositioned to `lay`, their subjects' masks in
    the target when None. queries: which of a subject's tokens read the reference, all when None. offset: tokens of text
    before the picture's.
    """
    parts = []
    asking = subject_masks if queries is None else queries
    for i in range(subject_masks.shape[1]):
        if size is None:
            source = torch.arange(reference_masks.shape[2], device=subject_masks.device)
            source = torch.where(reference_masks[:, i], source, -1)
        else:
            source = reposition_source(reference_masks[:, i], (subject_masks if lay is None else lay)[:, i], size)
        rows, rows_real = _listed(asking[:, i])
        places, keys_real = _listed(source >= 0)
        if not rows.shape[1] or not places.shape[1]:
            continue
        keys = source.gather(1, places).clamp_min(0)
        all_real = bool(keys_real.all())
        real = None if all_real else keys_real
        parts.append(SubjectPart(i, rows + offset, rows_real, keys + offset, places + offset, real))
    return parts


def _listed(mask: Bool[Tensor, "b n"]) -> tuple[Int[Tensor, "b r"], Bool[Tensor, "b r"]]:
    """The set places of each row, in order, then others as padding; and which are set. No place is named twice."""
    most = int(mask.sum(1).max()) if len(mask) else 0
    order = mask.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
    return order, mask.gather(1, order)


def at_places(x: Float[Tensor, "b h n d"], places: Int[Tensor, "b r"]) -> Float[Tensor, "b h r d"]:
    """The tokens of x at the places of each item."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def read_references(
    q: Float[Tensor, "b h n d"],
    out: Float[Tensor, "b h n e"],
    lse: Float[Tensor, "b h n"],
    parts: Sequence[SubjectPart],
    key_values: Callable[[SubjectPart], tuple[Tensor, Tensor]],
    *,
    boost: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Add the references to an attention that is known with its log-sum-exp: as if all had been in one softmax.

    key_values: `part -> k [b h r d], v [b h r e]` of its keys. boost: added to all reference logits.
    """
    for part in parts:
        k, v = key_values(part)
        mask = None if part.keys_real is None else part.keys_real[:, None, None]
        rows = at_places(q, part.rows)
        new, new_lse = attention_with_lse(rows, k, v, mask=mask, scale=scale)
        new_lse = (new_lse + boost).masked_fill(~part.rows_real[:, None], -torch.inf)
        old, old_lse = at_places(out, part.rows), at_places(lse[..., None], part.rows)[..., 0]
        total = torch.logaddexp(old_lse, new_lse)
        kept, added = ((x - total).exp()[..., None] for x in (old_lse, new_lse))
        merged = (kept * old.to(total.dtype) + added * new.to(total.dtype)).to(out.dtype)
        places = part.rows[:, None, :, None]
        out = out.scatter(2, places.expand(-1, out.shape[1], -1, out.shape[3]), merged)
        lse = lse.scatter(2, part.rows[:, None].expand(-1, lse.shape[1], -1), total)
    return out


def reference_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    k_ref: Float[Tensor, "b s h m d"],
    v_ref: Float[Tensor, "b s h m e"],
    subject_masks: Bool[Tensor, "b s n"],
    reference_masks: Bool[Tensor, "b s m"],
    *,
    isolate: bool = True,
    boost: float = 0.0,
    scale: float | None = None,
    overlap: Overlap = "refuse",
    implementation: Implementation = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attention of a target picture to itself and to one reference picture for each subject, in one softmax.

    Key j of reference i is read by query p where reference_masks[i, j] and subject_masks[i, p]; keys of the target by
    all, with `isolate` under `isolation_mask`. boost: added to the logits of all reference keys (`ref_sa_lambda`).
    scale: multiplies logits; None means d ** -0.5. A subject without a query or a key reads no reference.
    overlap: for isolation as in `isolation_mask`; tokens in two subjects read both references, the later one's only
    under "later". implementation: "gathered" merges small calls for each subject, "masked" is one call over all keys
    under a mask; "auto" gathers. Both give the same.
    Raises ValueError for shapes that do not fit each other, TypeError for masks that are not boolean.
    """
    where = "reference_attention"
    _check_masks(where, "subject_masks", subject_masks, 3)
    _check_masks(where, "reference_masks", reference_masks, 3)
    b, h, n, d = q.shape
    s, m = k_ref.shape[1], k_ref.shape[3]
    wanted = {
        "k": (k, (b, h, n, d)),
        "v": (v, (b, h, n, v.shape[-1])),
        "k_ref": (k_ref, (b, s, h, m, d)),
        "v_ref": (v_ref, (b, s, h, m, v.shape[-1])),
        "subject_masks": (subject_masks, (b, s, n)),
        "reference_masks": (reference_masks, (b, s, m)),
    }
    for name, (given, shape) in wanted.items():
        if given.shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(given.shape)}; with q {tuple(q.shape)} expected {shape}"
            )
    if not math.isfinite(boost):
        raise ValueError(f"{where}: boost is {boost}; expected a finite number")
    if implementation not in ("auto", "gathered", "masked"):
        raise ValueError(f"{where}: implementation is {implementation!r}; choose 'auto', 'gathered' or 'masked'")
    own = isolation_mask(subject_masks, overlap=overlap)[:, None] if isolate else None
    asking = _settled(subject_masks, overlap, where) if overlap == "later" else subject_masks
    if implementation == "masked":
        seen = (asking.mT[..., None] & reference_masks[:, None]).flatten(2)  # b n s*m
        left = torch.ones(b, n, n, dtype=torch.bool, device=q.device) if own is None else own[:, 0]
        mask = torch.cat([seen, left], -1)[:, None]
        if boost:
            bias = torch.zeros(s * m + n, dtype=q.dtype, device=q.device)
            bias[: s * m] = boost
            mask = bias.expand_as(mask).masked_fill(~mask, -torch.inf)
        keys, values = (torch.cat([x.transpose(1, 2).flatten(2, 3), y], 2) for x, y in ((k_ref, k), (v_ref, v)))
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
    out, lse = attention_with_lse(q, k, v, mask=own, scale=scale)

    def key_values(part: SubjectPart) -> tuple[Tensor, Tensor]:
        return at_places(k_ref[:, part.subject], part.keys), at_places(v_ref[:, part.subject], part.keys)

    return read_references(q, out, lse, subject_parts(asking, reference_masks), key_values, boost=boost, scale=scale)
