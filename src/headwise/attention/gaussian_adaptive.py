"""Gaussian adaptive attention (GAAM): a value counts by the density of its own standardised value, without queries.

    z_k = (x - mean - offset_k) / sigma,   w proportional to prod_k N(z_k; 0, width_k),   out = x * w,   sum w = 1

A product of Gaussians is a Gaussian and the sum to one removes its constants, so the product of any number of them is
one softmax of a parabola, w = softmax(-A (x - mean - B)^2 / (2 sigma^2)) with A = sum 1 / width^2 and
B = (sum offset / width^2) / A: two numbers a head. `combine="sum"` is a real mixture, which can have several modes.
O(numel), whatever the number of Gaussians.

Paper: headwise/papers/gaussian_adaptive_attention.py (Ioannides, Chadha, Elkins, 2024).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.point import HeadPoint

__all__ = [
    "GaussianAdaptiveAttention",
    "GaussianAdaptiveBlock",
    "gaussian_attention_weights",
    "importance_factor",
    "load_official_state_dict",
]


def gaussian_attention_weights(
    x: Float[Tensor, "..."],
    offset: Float[Tensor, "... k"],
    width: Float[Tensor, "... k"],
    dim: int = -1,
    *,
    combine: str = "product",
    mixture: Float[Tensor, "... k"] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    eps: float = 1e-8,
    offset_units: str = "input",
    official_clamp: bool = False,
    official_padding: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Weights of the shape of x that sum to 1 along `dim`.

    offset, width: `[k]`, or `[... k]` where `...` broadcasts against x without `dim`; a width counts by its square.
    combine: "product" (the official code, one Gaussian in effect) or "sum" (a mixture). mixture: logits of its parts,
    None: equal parts. mask: True = real, broadcastable to x; hidden places are in no statistic and weigh 0, and a row
    without a real place weighs 0. eps: added to the unbiased variance. offset_units: "input" (the paper), or "sigma",
    offsets in standard deviations. One value alone weighs 1.
    official_clamp: the released code's way, a product of densities over max(sum, eps), which underflows where several
    Gaussians meet and then sums below 1. official_padding: True where padding stands for 0 in mean and variance but is
    counted, as in the released code.
    Raises ValueError for a dim that x has not, integers, shapes that do not fit and unknown choices.
    """
    _check_choices(combine, offset_units)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"gaussian_attention_weights: dim {dim} is out of range for x of {x.ndim} axes")
    if not x.is_floating_point():
        raise ValueError(f"gaussian_attention_weights: x is {x.dtype}; expected floating point")
    dim = dim % x.ndim
    lead = max(offset.ndim, width.ndim) - 1
    if offset.shape[-1] < 1 or offset.shape[-1] != width.shape[-1] or lead not in (0, x.ndim - 1):
        raise ValueError(
            f"gaussian_attention_weights: offset {tuple(offset.shape)} and width {tuple(width.shape)}; expected [k] or "
            f"[... k] with {x.ndim - 1} axes before k, and k of 1 or more in both"
        )
    kept = x.dtype
    x, offset, width = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (x, offset, width))
    seen = None if mask is None else mask.bool()
    centred, variance = _standardise(x, dim, seen, eps, official_padding)
    if offset_units == "sigma":
        centred, variance = centred * variance.rsqrt(), torch.ones_like(variance)

    def place(one: Tensor) -> Tensor:
        """`[...]` beside x: an axis where `dim` is."""
        return one.unsqueeze(dim) if lead else one

    if official_clamp:
        if combine != "product":
            raise ValueError("gaussian_attention_weights: official_clamp is the released code's product; combine='sum'")
        weights = torch.ones_like(centred)
        for k in range(offset.shape[-1]):
            square = place(width[..., k].square())
            z = (centred - place(offset[..., k])).square() / variance
            weights = weights * (torch.exp(-z / (2 * square)) / (2 * math.pi * square).sqrt())
        weights = weights / weights.sum(dim, keepdim=True).clamp_min(eps)
        return (weights if seen is None else weights.masked_fill(~seen, 0)).to(kept)
    precision = width.square().reciprocal()
    if combine == "product":
        total = precision.sum(-1)
        centre = (offset * precision).sum(-1) / total
        logits = -0.5 * place(total) * (centred - place(centre)).square() / variance
    else:
        parts = torch.zeros_like(offset) if mixture is None else mixture.to(offset.dtype)
        scale = parts.log_softmax(-1) + 0.5 * precision.log()
        logits = torch.stack(
            [
                place(scale[..., k])
                - 0.5 * place(precision[..., k]) * (centred - place(offset[..., k])).square() / variance
                for k in range(offset.shape[-1])
            ]
        ).logsumexp(0)
    if seen is None:
        return logits.softmax(dim).to(kept)
    empty = ~seen.any(dim, keepdim=True) if seen.ndim == x.ndim else ~seen.expand(x.shape).any(dim, keepdim=True)
    weights = logits.masked_fill(~seen, -torch.inf).masked_fill(empty, 0).softmax(dim)
    return weights.masked_fill(~seen, 0).to(kept)


def _standardise(x: Tensor, dim: int, seen: Tensor | None, eps: float, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """x less its mean, and its unbiased variance plus eps, which alone is left of one value."""
    if x.shape[dim] == 1 or not x.numel():
        return torch.zeros_like(x), torch.full_like(x, eps)
    if padding is not None:
        counted = x.masked_fill(padding, 0)
        mean = counted.mean(dim, keepdim=True)
        return x - mean, counted.var(dim, keepdim=True) + eps
    if seen is None:
        variance, mean = torch.var_mean(x, dim, keepdim=True)
        return x - mean, variance + eps
    share = seen.to(x.dtype).expand(x.shape)
    count = share.sum(dim, keepdim=True)
    real = torch.where(seen, x, 0)
    mean = real.sum(dim, keepdim=True) / count.clamp_min(1)
    centred = torch.where(seen, real - mean, 0)
    return centred, centred.square().sum(dim, keepdim=True) / (count - 1).clamp_min(1) + eps


def _check_choices(combine: str, offset_units: str) -> None:
    if combine not in ("product", "sum") or offset_units not in ("input", "sigma"):
        raise ValueError(
            f"gaussian attention: combine {combine!r}, offset_units {offset_units!r}; choose 'product' or 'sum', and "
            "'input' or 'sigma'"
        )


def importance_factor(weights: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """The weights of each input scaled to [0, 1] by their least and greatest; 0 where all are equal.

    Its mean over a data set ranks features, times or layers.
    """
    flat = weights.flatten(1)
    shape = (-1, *[1] * (weights.ndim - 1))
    low, high = flat.amin(1).view(shape), flat.amax(1).view(shape)
    return (weights - low) / (high - low).clamp_min(torch.finfo(weights.dtype).tiny)


class GaussianAdaptiveAttention(nn.Module):
    """Multi-head Gaussian adaptive attention on tensors of two axes or more; the same shape comes out.

    num_gaussians: of each head. dim: the axis of statistics, along which weights sum to 1. head_dim_axis: the axis that
    is cut into heads, contiguous, the last with what is left over; None is `dim` itself, as in the released code, where
    each head then sees other times (dim a time axis). For heads of features that are weighed over time: dim=1,
    head_dim_axis=-1. combine, offset_units, eps, official_clamp: as in `gaussian_attention_weights`.
    rescale: multiply by the number of values that a weight is shared among, so that the mean weight is 1.
    width_init: "github" (log width of N(0, 1)), "pypi" (width N(0, 1), as in the package 0.1.5), or a number.
    padding_value: places equal to it count as zeros in the statistics and come out unchanged: the released code's
    padding. `attention_mask` is padding that has no influence, and comes out as 0.
    Heads that are equal groups of the last axis of `[b t c]` can be edited.
    """

    patterns = ("noncausal self",)

    def __init__(
        self,
        num_heads: int,
        num_gaussians: int = 1,
        dim: int = -1,
        *,
        head_dim_axis: int | None = None,
        combine: str = "product",
        offset_units: str = "input",
        rescale: bool = False,
        width_init: str | float = "github",
        official_clamp: bool = False,
        padding_value: float | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        _check_choices(combine, offset_units)
        if num_heads < 1 or num_gaussians < 1:
            raise ValueError(
                f"GaussianAdaptiveAttention: num_heads {num_heads}, num_gaussians {num_gaussians}; both are 1 or more"
            )
        if padding_value is not None and math.isnan(padding_value):
            raise ValueError(
                "GaussianAdaptiveAttention: padding_value is NaN, which equals nothing; pass a mask instead"
            )
        if isinstance(width_init, str) and width_init not in ("github", "pypi"):
            raise ValueError(
                f"GaussianAdaptiveAttention: width_init {width_init!r}; choose 'github', 'pypi' or a width"
            )
        if not isinstance(width_init, str) and width_init <= 0:
            raise ValueError(f"GaussianAdaptiveAttention: width_init {width_init}; a width is above 0")
        self.num_heads, self.num_gaussians, self.dim, self.head_dim_axis = num_heads, num_gaussians, dim, head_dim_axis
        self.combine, self.offset_units, self.rescale = combine, offset_units, rescale
        self.official_clamp, self.padding_value, self.eps = official_clamp, padding_value, eps
        self.offset = nn.Parameter(torch.zeros(num_heads, num_gaussians))
        drawn = torch.randn(num_heads, num_gaussians)
        if width_init == "pypi":
            drawn = drawn.abs().clamp_min(1e-4).log()
        elif not isinstance(width_init, str):
            drawn = torch.full_like(drawn, math.log(width_init))
        self.log_width = nn.Parameter(drawn)
        self.mixture = nn.Parameter(torch.zeros(num_heads, num_gaussians)) if combine == "sum" else None
        self.head_point = HeadPoint(num_heads)

    @staticmethod
    def example() -> "GaussianAdaptiveAttention":
        return GaussianAdaptiveAttention(4, 2, dim=1, head_dim_axis=-1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_gaussians={self.num_gaussians}, dim={self.dim}, "
            f"head_dim_axis={self.head_dim_axis}, combine={self.combine!r}"
        )

    def weights(
        self, x: Float[Tensor, "..."], attention_mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "..."]:
        """Weights of the shape of x. attention_mask: True = real, over the first axes of x, such as `[b t]`.

        Raises ValueError for axes that x has not, and more heads than places.
        """
        dim, axis = self._axes(x)
        size, heads = x.shape[axis] // self.num_heads, self.num_heads
        mask = attention_mask
        if mask is not None:
            if mask.shape != x.shape[: mask.ndim]:
                raise ValueError(
                    f"GaussianAdaptiveAttention: attention_mask is {tuple(mask.shape)}, x {tuple(x.shape)}; the mask "
                    "has the first axes of x"
                )
            mask = mask.bool().view(*mask.shape, *[1] * (x.ndim - mask.ndim)).expand(x.shape)
        if x.shape[axis] % heads == 0:
            return self._of(x, mask, dim, axis, slice(0, heads))
        cut = size * (heads - 1)
        parts = []
        for part, start, length in ((slice(0, heads - 1), 0, cut), (slice(heads - 1, heads), cut, x.shape[axis] - cut)):
            inner = None if mask is None else mask.narrow(axis, start, length)
            parts.append(self._of(x.narrow(axis, start, length), inner, dim, axis, part))
        return torch.cat(parts, axis)

    def _axes(self, x: Tensor) -> tuple[int, int]:
        if x.ndim < 2:
            raise ValueError(f"GaussianAdaptiveAttention: x is {tuple(x.shape)}; expected two axes or more")
        axes = []
        for name, axis in (("dim", self.dim), ("head_dim_axis", self.head_dim_axis)):
            axis = self.dim if axis is None else axis
            if not -x.ndim <= axis < x.ndim:
                raise ValueError(
                    f"GaussianAdaptiveAttention: {name} {axis} is out of range for x of shape {tuple(x.shape)}"
                )
            axes.append(axis % x.ndim)
        if x.shape[axes[1]] < self.num_heads:
            raise ValueError(
                f"GaussianAdaptiveAttention: num_heads {self.num_heads} for {x.shape[axes[1]]} places of axis "
                f"{axes[1]}; a head has one place or more"
            )
        return axes[0], axes[1]

    def _of(self, x: Tensor, mask: Tensor | None, dim: int, axis: int, heads: slice) -> Tensor:
        """Weights of some heads, which share x's axis equally."""
        offset, log_width = self.offset[heads], self.log_width[heads]
        count = offset.shape[0]
        split = (axis, (count, x.shape[axis] // count))
        rows = x.unflatten(*split)
        inner = axis + 1 if dim == axis else dim + (dim > axis)
        shape = [1] * x.ndim
        shape[axis if inner > axis else axis - 1] = count

        def place(one: Tensor) -> Tensor:
            return one.view(*shape, self.num_gaussians)

        weights = gaussian_attention_weights(
            rows,
            place(offset),
            place(log_width).exp(),
            inner,
            combine=self.combine,
            mixture=None if self.mixture is None else place(self.mixture[heads]),
            mask=None if mask is None else mask.unflatten(*split),
            eps=self.eps,
            offset_units=self.offset_units,
            official_clamp=self.official_clamp,
            official_padding=None if self.padding_value is None else rows == self.padding_value,
        )
        return weights.flatten(axis, axis + 1)

    def forward(
        self,
        x: Float[Tensor, "..."],
        attention_mask: Bool[Tensor, "..."] | None = None,
        *,
        return_weights: bool = False,
    ) -> Float[Tensor, "..."] | tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """x times its weights, and with return_weights these too. attention_mask: True = real, such as `[b t]`."""
        weights = self.weights(x, attention_mask)
        out = x * weights
        if attention_mask is not None:
            real = attention_mask.bool().view(*attention_mask.shape, *[1] * (x.ndim - attention_mask.ndim))
            out = torch.where(real, out, 0)
        if self.rescale:
            out = out * self._shared_by(x, attention_mask)
        if self.padding_value is not None:
            out = torch.where(x == self.padding_value, x, out)
        axis = self._axes(x)[1]
        if x.ndim == 3 and axis == 2 and x.shape[2] % self.num_heads == 0:
            out = self.head_point(out.unflatten(2, (self.num_heads, -1))).flatten(2)
        return (out, weights) if return_weights else out

    def _shared_by(self, x: Tensor, mask: Tensor | None) -> Tensor | int:
        """How many values share a weight of 1: the length of a head's part of `dim`, or the real ones of it."""
        dim, axis = self._axes(x)
        if dim == axis:
            size, places = x.shape[axis] // self.num_heads, torch.arange(x.shape[axis], device=x.device)
            last = x.shape[axis] - size * (self.num_heads - 1)
            lengths = torch.where(places < size * (self.num_heads - 1), size, last).to(x.dtype)
            return lengths.view(*[1] * axis, -1, *[1] * (x.ndim - axis - 1))
        if mask is None or mask.ndim <= dim:
            return x.shape[dim]
        real = mask.sum(dim, keepdim=True).to(x.dtype)
        return real.view(*real.shape, *[1] * (x.ndim - real.ndim))


class GaussianAdaptiveBlock(nn.Module):
    """Layers of Gaussian adaptive attention, each added to its input: x <- attention(x) + x.

    num_heads, num_gaussians, dims: one number for all layers, or one for each. options: of the attention.
    """

    patterns = ("noncausal self",)

    def __init__(
        self,
        num_layers: int,
        num_heads: int | Sequence[int],
        num_gaussians: int | Sequence[int] = 1,
        dims: int | Sequence[int] = -1,
        **options,
    ) -> None:
        super().__init__()
        lists = {"num_heads": num_heads, "num_gaussians": num_gaussians, "dims": dims}
        each = {name: [one] * num_layers if isinstance(one, int) else list(one) for name, one in lists.items()}
        if wrong := [name for name, values in each.items() if len(values) != num_layers or num_layers < 1]:
            raise ValueError(
                f"GaussianAdaptiveBlock: {wrong[0]} has {len(each[wrong[0]])} numbers for num_layers {num_layers}; "
                "give one for each layer"
            )
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(heads, gaussians, dim, **options)
            for heads, gaussians, dim in zip(*each.values(), strict=True)
        )

    @staticmethod
    def example() -> "GaussianAdaptiveBlock":
        return GaussianAdaptiveBlock(2, 4, 2)

    def forward(
        self,
        x: Float[Tensor, "..."],
        attention_mask: Bool[Tensor, "..."] | None = None,
        *,
        return_weights: bool = False,
    ) -> Float[Tensor, "..."] | tuple[Float[Tensor, "..."], list[Float[Tensor, "..."]]]:
        """x after all layers, and with return_weights the weights of each."""
        seen = []
        for layer in self.layers:
            out, weights = layer(x, attention_mask, return_weights=True)
            x = out + x
            seen.append(weights)
        return (x, seen) if return_weights else x


def load_official_state_dict(
    module: GaussianAdaptiveAttention | GaussianAdaptiveBlock, state: Mapping[str, Tensor]
) -> None:
    """Take the parameters of the released `MultiHeadGaussianAdaptiveAttention` or `GaussianBlock`.

    Its widths may be negative: only their squares count. Raises ValueError for names that are missing or too many, and
    for a width of 0, with which the released code gives NaN.
    """
    block = isinstance(module, GaussianAdaptiveBlock)
    layers = module.layers if block else [module]
    wanted = {}
    for number, layer in enumerate(layers):
        for head in range(layer.num_heads):  # type: ignore[arg-type]
            stem = f"layers.{number}.attention_heads.{head}." if block else f"attention_heads.{head}."
            wanted[stem + "mean_offsets"], wanted[stem + "c"] = (layer.offset, head), (layer.log_width, head)
    if set(wanted) != set(state):
        odd = sorted(set(wanted) ^ set(state))
        raise ValueError(f"load_official_state_dict: {odd[0]!r} is in one of state and module only; sizes must agree")
    for name, (parameter, head) in wanted.items():
        if state[name].shape != parameter[head].shape:
            raise ValueError(
                f"load_official_state_dict: {name} has {state[name].numel()} Gaussians, expected {parameter.shape[1]}"
            )
        if name.endswith(".c") and not state[name].all():
            raise ValueError(f"load_official_state_dict: {name} has a width of 0; widths are not 0")
    with torch.no_grad():
        for name, (parameter, head) in wanted.items():
            parameter[head] = state[name].abs().log() if name.endswith(".c") else state[name]
