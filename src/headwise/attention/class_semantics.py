"""Class semantics-based attention: what a recogniser says over time weighs the channels and steps of other features.

    a_c = sigmoid(W2 relu(W1 pool_t R))     [b c]      from each class's distribution over time
    a_t = sigmoid(conv1d_k(R))              [b c t]
    F'  = a_c F + a_t F

R are semantics, as class scores over time; F are the features that a localiser reads. With R = F and the channel branch
alone this is squeeze-and-excitation.

Paper: headwise/papers/class_semantics_attention.py (Sridhar et al., ICCV 2021). The layers are reconstructed: the paper
has no public code, and its figure and summary name two branches on R, a channel one and a temporal one, whose attended
copies of F are fused. Several other modules of the literature are called CSA, too.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["ClassSemanticsAttention", "SqueezeExcitation", "pool_over_time"]

Pool = Literal["mean", "mean+std", "max"]
Fuse = Literal["sum", "mean", "concat1x1"]


def pool_over_time(
    x: Float[Tensor, "b c t"], how: Pool = "mean", mask: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, "b p"]:
    """Statistics of each channel over its real steps: the mean, mean and standard deviation (2 c of them), or the most.

    mask: True for real steps. A sequence without any gives 0.
    """
    if how not in ("mean", "mean+std", "max"):
        raise ValueError(f"pool_over_time: how is {how!r}; expected 'mean', 'mean+std' or 'max'")
    real = torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x.dtype)
    if how == "max":
        most = x.masked_fill(real == 0, -torch.inf).amax(-1)
        return torch.where(real.any(-1), most, torch.zeros_like(most))
    count = real.sum(-1).clamp_min(1)
    kept = torch.where(real == 0, torch.zeros_like(x), x)  # what stands in padding may be anything
    average = kept.sum(-1) / count
    if how == "mean":
        return average
    spread = (((x - average[..., None]).square() * real).sum(-1) if mask is None else _spread(x, average, real)) / count
    return torch.cat([average, spread.clamp_min(1e-12).sqrt()], 1)


def _spread(x: Tensor, average: Tensor, real: Tensor) -> Tensor:
    return torch.where(real == 0, torch.zeros_like(x), (x - average[..., None]).square()).sum(-1)


class ClassSemanticsAttention(nn.Module):
    """Weigh `features` `[b c t]` by what `semantics` `[b r t]` say.

    semantic_dim, feature_dim: r and c. reduction: the channel branch is c // reduction wide, at least 1 (2 for small
    networks, 16 for large ones); hidden_dim: its width outright. kernel_size: odd, of the time branch; groups: of its
    convolution. branches: which of the two. time_shared: one weight per step for all channels. fuse: "sum" of the two
    attended copies, their "mean", or a 1x1 convolution of both. temporal_pool: what the channel branch knows of time.
    source: "features" ignores the semantics and takes the features in their place, which is the control.
    Raises ValueError for options out of range.

    >>> csa = ClassSemanticsAttention(semantic_dim=20, feature_dim=32, reduction=2)
    >>> csa(torch.randn(2, 32, 50), torch.randn(2, 20, 50)).shape
    torch.Size([2, 32, 50])
    """

    layout = "b c t"
    patterns = ("noncausal self", "noncausal cross")

    def __init__(
        self,
        semantic_dim: int,
        feature_dim: int,
        *,
        reduction: int = 16,
        hidden_dim: int | None = None,
        kernel_size: int = 3,
        groups: int = 1,
        branches: tuple[str, ...] | list[str] = ("channel", "time"),
        time_shared: bool = False,
        fuse: Fuse = "sum",
        temporal_pool: Pool = "mean",
        source: Literal["semantics", "features"] = "semantics",
        interpolate: bool = False,
    ) -> None:
        super().__init__()
        given = feature_dim if source == "features" else semantic_dim
        hidden = max(1, feature_dim // reduction) if hidden_dim is None and reduction > 0 else hidden_dim
        _check(given, feature_dim, hidden, kernel_size, groups, branches, fuse, source)
        self.semantic_dim, self.feature_dim, self.source = given, feature_dim, source
        self.branches, self.fuse = tuple(branches), fuse
        self.temporal_pool: Pool = temporal_pool
        self.interpolate = interpolate
        self.channel: nn.Module | None = None
        self.time: nn.Module | None = None
        if "channel" in branches:
            statistics = given * (2 if temporal_pool == "mean+std" else 1)
            width = int(hidden or 1)
            self.channel = nn.Sequential(nn.Linear(statistics, width), nn.ReLU(), nn.Linear(width, feature_dim))
        if "time" in branches:
            out = 1 if time_shared else feature_dim
            self.time = nn.Conv1d(given, out, kernel_size, padding=kernel_size // 2, groups=groups)
        both = self.channel is not None and self.time is not None
        self.mix = nn.Conv1d(2 * feature_dim, feature_dim, 1) if fuse == "concat1x1" and both else None

    def gates(
        self, semantics: Float[Tensor, "b r t"], mask: Bool[Tensor, "b t"] | None = None
    ) -> dict[str, Float[Tensor, "b _ _"]]:
        """The weights of each branch in (0, 1): "channel" `[b c 1]`, "time" `[b c t]` (`[b 1 t]` where shared)."""
        found = {}
        if self.channel is not None:
            found["channel"] = self.channel(pool_over_time(semantics, self.temporal_pool, mask)).sigmoid()[..., None]
        if self.time is not None:
            kept = semantics if mask is None else semantics.masked_fill(~mask[:, None], 0)
            found["time"] = self.time(kept).sigmoid()
        return found

    def forward(
        self,
        features: Float[Tensor, "b c t"],
        semantics: Float[Tensor, "b r s"] | None = None,
        mask: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b c t"]:
        """mask: True for real steps; what stands at others reaches no real one. With interpolate, semantics of another
        length are stretched to the features' (a pyramid's levels); otherwise that raises ValueError, as missing
        semantics and other widths do.
        """
        read = features if self.source == "features" else semantics
        if read is None:
            raise ValueError(
                "ClassSemanticsAttention: semantics are missing; give [b r t], or make it source='features'"
            )
        if read.shape[1] != self.semantic_dim or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"ClassSemanticsAttention: semantics have {read.shape[1]} channels and features {features.shape[1]}; "
                f"expected {self.semantic_dim} and {self.feature_dim}"
            )
        if read.shape[2] != features.shape[2]:
            if not self.interpolate:
                raise ValueError(
                    f"ClassSemanticsAttention: semantics have {read.shape[2]} steps and features {features.shape[2]}; "
                    "give both at one rate, or make it with interpolate=True"
                )
            read = nn.functional.interpolate(read, features.shape[2], mode="linear", align_corners=False)
        gates = list(self.gates(read, mask).values())
        if self.mix is not None:
            return self.mix(torch.cat([gate * features for gate in gates], 1))
        whole = sum(gates[1:], gates[0])  # of the gates, not of the attended copies: the features are read once
        return (whole / len(gates) if self.fuse == "mean" else whole) * features


class SqueezeExcitation(ClassSemanticsAttention):
    """Squeeze-and-excitation over time (Hu et al., 2018): the channel branch alone, reading the features themselves."""

    def __init__(self, feature_dim: int, *, reduction: int = 16, hidden_dim: int | None = None) -> None:
        super().__init__(
            feature_dim,
            feature_dim,
            reduction=reduction,
            hidden_dim=hidden_dim,
            branches=("channel",),
            source="features",
        )


def _check(
    given: int,
    features: int,
    hidden: int | None,
    kernel: int,
    groups: int,
    branches: tuple[str, ...] | list[str],
    fuse: str,
    source: str,
) -> None:
    name = "ClassSemanticsAttention"
    if min(given, features, groups) < 1 or hidden is None or hidden < 1:
        raise ValueError(
            f"{name}: semantic_dim {given}, feature_dim {features}, hidden_dim {hidden}, groups {groups}; all must be "
            "at least 1, and so must reduction"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{name}: kernel_size is {kernel}; expected an odd number, so that steps keep their places")
    if given % groups or features % groups:
        raise ValueError(f"{name}: groups {groups} does not divide {given} and {features} channels")
    if not branches or set(branches) - {"channel", "time"}:
        raise ValueError(f"{name}: branches is {branches}; expected 'channel', 'time' or both")
    if fuse not in ("sum", "mean", "concat1x1"):
        raise ValueError(f"{name}: fuse is {fuse!r}; expected 'sum', 'mean' or 'concat1x1'")
    if source not in ("semantics", "features"):
        raise ValueError(f"{name}: source is {source!r}; expected 'semantics' or 'features'")
