"""Informed tokens: the image tokens that the vision tower itself singles out, without keeping its attention.

    local    the floor(ratio V) tokens with the largest  u_j = sum_h E_first[h, CLS, j]
    summary  the upper outliers of  w_j = sum_h E_last[h, CLS, j]:  w_j > Q3 + 1.5 (Q3 - Q1)

E_l is the attention of layer l of the tower; only its CLS row is formed. In a tower without a CLS token the mean over
all rows, the attention that a token receives, takes its place. Local tokens that are summary tokens count as
the latter.

Paper: headwise/papers/imbalanced_attention.py (Arif et al., 2025).
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.groups import KeyGroup, positions
from headwise.attend.read import Probe, Reading
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import layout, unwrap
from headwise.hf.images import image_positions
from headwise.hf.inputs import as_inputs, frugal
from headwise.hf.session import probe

__all__ = ["InformedTokens", "VisionTokenScores", "choose_informed", "informed_tokens", "outlier_tokens"]

Rule = Literal["auto", "cls", "received"]
ROWS = 256  # of a tower without CLS, formed at once


@dataclass(frozen=True)
class InformedTokens:
    """Which positions of the text decoder hold local and summary tokens, `[b s]` each; no position is both."""

    local: Bool[Tensor, "b s"]
    summary: Bool[Tensor, "b s"]

    def group(self, which: Literal["local", "summary", "both"] = "both") -> KeyGroup:
        """A key group for these inputs."""
        if which not in ("local", "summary", "both"):
            raise ValueError(f"InformedTokens: which is {which!r}; choose local, summary or both")
        return positions(self.local | self.summary if which == "both" else getattr(self, which))


def outlier_tokens(scores: Float[Tensor, "*n v"]) -> Bool[Tensor, "*n v"]:
    """Scores above Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation. Raises ValueError for fewer than four."""
    v = scores.shape[-1]
    if v < 4:
        raise ValueError(f"outlier_tokens: there are {v} tokens; quartiles need at least 4")
    work = scores.double()
    low, high = work.quantile(torch.tensor([0.25, 0.75], dtype=work.dtype, device=work.device), dim=-1)
    return work > (high + 1.5 * (high - low))[..., None]


def choose_informed(
    local_scores: Float[Tensor, "*n v"], summary_scores: Float[Tensor, "*n v"], local_ratio: float = 0.25
) -> tuple[Bool[Tensor, "*n v"], Bool[Tensor, "*n v"]]:
    """Local and summary tokens of images with v tokens, disjoint. The summary set may be empty.

    local_ratio: share of the tokens that are local before summary tokens are taken out, 0..1. Raises ValueError for a
    ratio outside and for fewer than four tokens.

    Notes: the authors take the top floor(v count / v) scores of the summary layer, which are the outliers themselves.
    """
    _check_ratio("choose_informed", local_ratio)
    summary = outlier_tokens(summary_scores)
    top = local_scores.topk(int(local_ratio * local_scores.shape[-1]), dim=-1).indices
    local = torch.zeros_like(summary).scatter_(-1, top, True)
    return local & ~summary, summary


def informed_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    local_ratio: float = 0.25,
    local_layer: int = 0,
    summary_layer: int = -2,
    rule: Rule = "auto",
) -> InformedTokens:
    """The informed tokens of a batch with pictures, in one forward.

    local_layer, summary_layer: of the vision tower, negative from the end. rule: "cls", "received" or "auto", which is
    the former where the tower has a CLS token. Raises UnsupportedModel for a model without a vision tower of its own,
    ValueError for inputs without pictures, layers that the tower has not and a ratio outside 0..1.
    """
    _check_ratio("informed_tokens", local_ratio)
    reader = VisionTokenScores(model, (local_layer, summary_layer), rule)
    given = as_inputs(model, inputs)
    images = image_positions(model, given)
    with torch.no_grad(), probe(model, reader):
        model(**{**frugal(model), **given})
    local, summary = reader.choose(images, local_ratio)
    return InformedTokens(local.cpu(), summary.cpu())


class VisionTokenScores(Probe):
    """Keeps, of two layers of a vision tower, what its tokens get from the CLS row (or from all rows).

    layers: two layers of the tower, negative from the end. rule: as in `informed_tokens`.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, int] = (0, -2), rule: Rule = "auto") -> None:
        super().__init__(before_edits=True)
        if rule not in ("auto", "cls", "received"):
            raise ValueError(f"VisionTokenScores: rule is {rule!r}; choose auto, cls or received")
        inner = unwrap(model)
        name = type(inner).__name__
        tower = next((tower for tower in layout(model).towers if tower.name == "vision"), None)
        if tower is None or tower.layers == 0:
            raise UnsupportedModel(
                f"{name}: it has no vision tower with attention; informed tokens are told by one, name the tokens "
                "by key groups instead"
            )
        config: Any = getattr(inner.config, "vision_config", inner.config)
        if getattr(config, "fullatt_block_indexes", None):
            raise UnsupportedModel(
                f"{name}: its vision tower attends in windows and reorders its tokens; name the tokens by key groups"
            )
        for layer in layers:
            if not -tower.layers <= layer < tower.layers:
                raise ValueError(
                    f"VisionTokenScores: layer {layer} is out of range; the vision tower has {tower.layers} layers "
                    f"(0 to {tower.layers - 1})"
                )
        self.layers = tuple(layer % tower.layers for layer in layers)
        self.has_cls = any(part.endswith(("class_embedding", "cls_token")) for part, _ in inner.named_parameters())
        if rule == "cls" and not self.has_cls:
            raise ValueError(
                f"VisionTokenScores: rule is 'cls', but the vision tower of {name} has no CLS token; choose received"
            )
        self.use_cls = self.has_cls and rule != "received"
        self.keeps_cls = self.has_cls and getattr(inner.config, "vision_feature_select_strategy", None) == "full"
        self.merged = int(getattr(config, "spatial_merge_size", 1)) ** 2
        self._thread = threading.local()

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        if call.tower != "vision" or call.layer not in self.layers:
            return
        if self.use_cls:
            scores = call.scores(slice(0, 1))
            given = (scores - torch.logsumexp(scores, -1, keepdim=True)).exp()[:, :, 0].sum(1)
        else:
            given = torch.zeros(call.q.shape[0], call.k.shape[2], dtype=call.work_dtype, device=call.q.device)
            for start in range(0, call.q.shape[2], ROWS):
                rows = slice(start, start + ROWS)
                given += (call.scores(rows) - call.finite_lse[:, :, rows, None]).exp().sum((1, 2))
            given = given / call.q.shape[2]
        given = given[:, 1:] if self.has_cls else given
        self._seen().setdefault(call.layer, []).extend(given.detach().unbind(0))

    def _seen(self) -> dict[int, list[Tensor]]:
        """Layer -> scores `[v]` image after image, of the pictures that no prompt has used yet."""
        return self._thread.__dict__.setdefault("seen", {})

    def choose(
        self, images: Bool[Tensor, "b t"], local_ratio: float
    ) -> tuple[Bool[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Local and summary tokens at the image tokens of a forward; uses up the pictures that were read for it.

        With more rows than pictures were read for (beams), each row of pictures serves as many rows. A prompt in
        chunks uses up its pictures one chunk after the other. Raises ValueError where tokens and pictures do not fit.
        """
        need, state = int(images.sum()), self._thread.__dict__
        seen = state.pop("seen", {})
        if seen:
            state["left"] = self._chosen(seen, local_ratio)
        left = state.get("left")
        if left is None or need == 0:
            if need:
                raise ValueError(
                    f"informed tokens: the prompt holds {need} image tokens, but the vision tower did not run since "
                    "the edit was attached; attach it before the picture is read, or name the tokens by key groups"
                )
            return torch.zeros_like(images), torch.zeros_like(images)
        total, rows = left.shape[1], images.shape[0]
        if rows == 1 and need < total:  # a part of the prompt
            state["left"], left, times = left[:, need:], left[:, :need], 1
        elif need % total == 0 and rows % (need // total) == 0:
            times = need // total
            state.pop("left")
        else:
            state.pop("left")
            raise ValueError(
                f"informed tokens: the prompt holds {need} image tokens, but the vision tower made {total}; name the "
                "tokens of such a model by key groups"
            )
        masks = []
        for chosen in left:
            mask = torch.zeros_like(images[::times])
            mask[images[::times]] = chosen.to(images.device)
            masks.append(mask.repeat_interleave(times, 0))
        return masks[0], masks[1]

    def _chosen(self, seen: dict[int, list[Tensor]], local_ratio: float) -> Bool[Tensor, "2 n"]:
        """Local and summary tokens of all pictures, one picture after the other."""
        pictures = []
        for scores in zip(*(seen[layer] for layer in self.layers), strict=True):
            merged = [score.view(-1, self.merged).mean(-1) for score in scores]
            chosen = torch.stack(choose_informed(merged[0], merged[1], local_ratio))
            pictures.append(torch.nn.functional.pad(chosen, (int(self.keeps_cls), 0)))
        return torch.cat(pictures, 1)


def _check_ratio(where: str, ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise ValueError(f"{where}: local_ratio is {ratio}; it must lie in 0..1")
