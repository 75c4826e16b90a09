"""How much each word moves a model's answer, and whether attention says the same.

    importance_t = || d y / d e_t ||    y: the logit of a class, e_t: the embedding of word t

Attention that correlates with it is called interpretable. Paper: headwise/papers/attention_adversarial_training.py
(Kitada and Iyatomi, 2021), after Jain and Wallace (2019).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.head_map import HeadMap
from headwise.errors import InputError
from headwise.hf.addresses import layout
from headwise.hf.inputs import as_inputs
from headwise.hf.maps import attention_maps

__all__ = [
    "AttentionGradientCorrelation",
    "attention_gradient_correlation",
    "gradient_importance",
    "head_gradient_correlation",
]


def gradient_importance(
    model: nn.Module, batch: Mapping[str, Any], *, target: Int[Tensor, " b"] | None = None
) -> Float[Tensor, "b t"]:
    """Length of the gradient of a logit for each word's embedding, 0 on padding.

    model: a classifier with `get_input_embeddings()`; it is run as it is (call `eval()` first to switch dropout off).
    batch: what its forward takes; words are padding where `attention_mask` is 0, or the embedding's padding id.
    target: the class of each item; None is the class with the largest logit, or the one logit there is.
    No gradient is accumulated in the model. Raises ValueError for a model whose output is not `[b]` or `[b, n]` logits.
    """
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], words: Tensor) -> Tensor:
        leaf = words.detach().requires_grad_()
        seen.append((args[0], leaf))
        return leaf

    handle = embedding.register_forward_hook(hook)
    try:
        # cuDNN refuses gradients through a recurrent network in evaluation mode.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            out = model(**batch)
            logits = out if isinstance(out, Tensor) else out.logits
            if logits.ndim == 1:
                logits = logits[:, None]
            if logits.ndim != 2:
                raise ValueError(
                    f"gradient_importance: logits are {tuple(logits.shape)}; give a classifier with `[b, n]` logits"
                )
            if not seen:
                raise ValueError("gradient_importance: the embedding did not run; give token ids, not embeddings")
            chosen = logits.argmax(-1) if target is None else target.to(logits.device)
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), seen[0][1])
    finally:
        handle.remove()
    mask = batch.get("attention_mask")
    padding = getattr(embedding, "padding_idx", None)
    if mask is None and padding is not None:
        mask = seen[0][0] != padding
    importance = gradient.norm(dim=-1)
    return importance if mask is None else importance.masked_fill(~mask.bool(), 0)


@dataclass(frozen=True)
class AttentionGradientCorrelation:
    """Pearson's r and Kendall's tau of each item `[b]`, -1 to 1; NaN where an item has no two different values."""

    pearson: Float[Tensor, " b"]
    kendall: Float[Tensor, " b"]

    @property
    def mean_pearson(self) -> float:
        """Mean over the items that have one."""
        return float(self.pearson.nanmean())

    @property
    def mean_kendall(self) -> float:
        """Mean over the items that have one."""
        return float(self.kendall.nanmean())


def attention_gradient_correlation(
    weights: Float[Tensor, "b t"], importance: Float[Tensor, "b s"], mask: Bool[Tensor, "b r"] | None = None
) -> AttentionGradientCorrelation:
    """Correlate attention weights with importance over the words of each item, padding left out.

    mask: True for real words; None is all. Kendall's tau (tau-b, ties shared) needs scipy (`headwise[tasks]`).
    Raises ValueError for shapes that differ, InputError without scipy.
    """
    if weights.shape != importance.shape or (mask is not None and mask.shape != weights.shape):
        raise ValueError(
            f"attention_gradient_correlation: weights {tuple(weights.shape)}, importance {tuple(importance.shape)}, "
            f"mask {None if mask is None else tuple(mask.shape)}; they must have one shape"
        )
    try:
        from scipy.stats import kendalltau
    except ImportError:
        raise InputError("attention_gradient_correlation: scipy is not installed; install headwise[tasks]") from None
    real = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    pearson, kendall = [], []
    for a, b, shown in zip(
        weights.detach().double().cpu(), importance.detach().double().cpu(), real.cpu(), strict=True
    ):
        a, b = a[shown], b[shown]
        same = len(a) < 2 or bool((a == a[0]).all() or (b == b[0]).all())
        pearson.append(math.nan if same else float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
        tau: Any = None if same else kendalltau(a.numpy(), b.numpy())
        kendall.append(math.nan if same else float(tau.statistic))
    return AttentionGradientCorrelation(torch.tensor(pearson), torch.tensor(kendall))


def head_gradient_correlation(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    rows: Literal["first", "last", "mean"] | str = "mean",
    target: Int[Tensor, " b"] | None = None,
) -> HeadMap:
    """For every head of a transformers classifier, how its attention correlates with gradient importance.

    rows: whose attention counts: the first row (BERT's [CLS]), the last real one (decoders), or the mean of all real
    rows. The map has the probes `gradient-pearson` and `gradient-kendall`, means over the items of the batch.
    """
    if rows not in ("first", "last", "mean"):
        raise ValueError(f"head_gradient_correlation: rows is {rows!r}; choose first, last or mean")
    inputs = {name: value for name, value in as_inputs(model, batch).items() if name != "labels"}
    importance = gradient_importance(model, inputs, target=target)
    mask = inputs.get("attention_mask")
    real = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask.bool()
    heads = layout(model).heads()
    with torch.no_grad():
        maps = attention_maps(model, inputs, heads)
    place = torch.arange(real.shape[1], device=real.device)
    if rows == "mean":
        share = real / real.sum(1, keepdim=True).clamp_min(1)
    else:
        chosen = (place * real).argmax(1) if rows == "last" else real.int().argmax(1)
        share = place == chosen[:, None]
    weights = torch.einsum("bt,bhts->bhs", share.to(maps), maps)
    found = [attention_gradient_correlation(weights[:, i], importance, real) for i in range(len(heads))]
    return HeadMap(
        {
            "gradient-pearson": {head: _number(one.mean_pearson) for head, one in zip(heads, found, strict=True)},
            "gradient-kendall": {head: _number(one.mean_kendall) for head, one in zip(heads, found, strict=True)},
        },
        layout(model),
        model=type(model).__name__,
        source=f"{len(importance)} items, rows: {rows}",
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
