"""Efficient local attention (ELA): gates along the height and the width of a feature map of a convolutional network.

    z_h = mean_w x,  z_w = mean_h x,   a = sigmoid(GroupNorm(Conv1d_k(z))),   y = x * a_h * a_w

No channel reduction and nothing that depends on the batch; 7 to 58 parameters a channel, O(b c h w).

Paper: headwise/papers/efficient_local_attention.py (Xu and Wan, 2024).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ELA", "EfficientLocalAttention", "gate_axes", "strip_gate", "strip_means"]

# kernel, channels of one group of the convolution, groups of the normalisation
VERSIONS = {"T": (5, 1, 32), "B": (7, 1, 16), "S": (5, 8, 16), "L": (7, 8, 16)}


def strip_means(x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h"], Float[Tensor, "b c w"]]:
    """Means over the width and over the height, each by the axis that is fast in the memory format of x."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        last = x.permute(0, 2, 3, 1)
        return last.mean(2).mT, last.mean(1).mT
    return x.mean(3), x.mean(2)


def strip_gate(
    strip: Float[Tensor, "b c n"],
    kernel: Float[Tensor, "c g k"],
    scale: Float[Tensor, " c"],
    shift: Float[Tensor, " c"],
    *,
    norm_groups: int,
    eps: float = 1e-5,
    activation: Literal["silu"] | None = None,
) -> Float[Tensor, "b c n"]:
    """sigmoid(GroupNorm(Conv1d(strip))), in (0, 1): the gate of one axis.

    kernel: weights of a convolution without bias, g channels a group, zero padding k // 2. scale, shift: of the
    normalisation, whose statistics are over a group's channels and the positions of this strip alone.
    activation: what timm's module has before the sigmoid; the paper has nothing there.
    """
    groups = strip.shape[1] // kernel.shape[1]
    normed = F.group_norm(
        F.conv1d(strip, kernel, None, 1, kernel.shape[-1] // 2, 1, groups), norm_groups, scale, shift, eps
    )
    return torch.sigmoid(F.silu(normed) if activation == "silu" else normed)


def gate_axes(
    x: Float[Tensor, "b c h w"], rows: Float[Tensor, "b c h"], columns: Float[Tensor, "b c w"]
) -> Float[Tensor, "b c h w"]:
    """x * rows[..., None] * columns[..., None, :], with one temporary where no gradient is wanted."""
    gated = x * rows.to(x.dtype).unsqueeze(3)
    columns = columns.to(x.dtype).unsqueeze(2)
    return gated * columns if torch.is_grad_enabled() else gated.mul_(columns)


class EfficientLocalAttention(nn.Module):
    """ELA on feature maps `[b c h w]`, in one of the paper's four versions.

    version: sets what the next three leave at None: T is kernel 5, depthwise, 32 norm groups (7 parameters a channel);
    B 7, depthwise, 16 (9); S 5, 8 channels a group, 16 (42); L 7, 8 channels a group, 16 (58).
    kernel_size: odd. conv_groups: groups of the convolution, so S has channels / 8, not 8. norm_groups: must divide
    channels; where it equals channels the gate keeps positions only, so small networks want fewer groups.
    shared: one convolution and one normalisation for both axes (True), as public implementations have it, or one each
    (False), as the paper's equations are written. None is what the variant has.
    variant: "timm" is the module that timm 1.0 calls ELA, another function: kernels of their own for each axis, one
    norm group, and SiLU before the sigmoid. version then sets kernel and groups of the convolution only.
    identity_init: start with both gates at sigmoid(4) = 0.982 instead of about 0.5, for insertion into a trained
    network. Not the paper's.
    act_layer, device, dtype: taken so that timm can make the module as `attn_layer` or `se_layer`; act_layer is unused.
    Raises ValueError for widths, kernels and groups that do not fit.
    """

    layout = "b c h w"
    patterns = ("noncausal self",)

    def __init__(
        self,
        channels: int,
        version: str = "B",
        *,
        kernel_size: int | None = None,
        conv_groups: int | None = None,
        norm_groups: int | None = None,
        shared: bool | None = None,
        variant: str = "paper",
        identity_init: bool = False,
        act_layer: object = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"EfficientLocalAttention: version {version!r}; choose T, B, S or L")
        if variant not in ("paper", "timm"):
            raise ValueError(f"EfficientLocalAttention: variant {variant!r}; choose 'paper' or 'timm'")
        kernel, together, wanted = VERSIONS[version]
        if variant == "timm":
            wanted = 1
        kernel = kernel if kernel_size is None else kernel_size
        if channels < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(
                f"EfficientLocalAttention: channels {channels}, kernel_size {kernel}; expected channels of 1 or more "
                "and an odd kernel, which leaves the length of a strip as it is"
            )
        groups = channels // together if conv_groups is None else conv_groups
        if groups < 1 or channels % groups or (conv_groups is None and channels % together):
            raise ValueError(
                f"EfficientLocalAttention: {channels} channels in {groups} conv_groups, version {version} has "
                f"{together} channels a group; choose version T or B, or conv_groups that divide {channels}"
            )
        norms = wanted if norm_groups is None else norm_groups
        if norms < 1 or channels % norms:
            raise ValueError(
                f"EfficientLocalAttention: norm_groups {norms} does not divide {channels} channels; the nearest that "
                f"does is norm_groups={math.gcd(channels, max(norms, 1))}"
            )
        shared = variant == "paper" if shared is None else shared
        self.channels, self.version, self.variant, self.shared = channels, version, variant, shared
        self.norm_groups = norms
        place = {"device": device, "dtype": dtype}

        def branch() -> tuple[nn.Conv1d, nn.GroupNorm]:
            made = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False, **place)
            return made, nn.GroupNorm(norms, channels, **place)

        self.conv, self.norm = branch()
        self.conv_w, self.norm_w = (None, None) if shared else branch()
        if identity_init:
            for norm in (self.norm, self.norm_w):
                if norm is not None:
                    nn.init.zeros_(norm.weight)
                    nn.init.constant_(norm.bias, 4.0)

    def extra_repr(self) -> str:
        return f"{self.channels}, version={self.version!r}, variant={self.variant!r}, shared={self.shared}"

    def gates(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h"], Float[Tensor, "b c w"]]:
        """The gates of rows and of columns, each in (0, 1)."""
        branches = (self.conv, self.norm), (self.conv_w or self.conv, self.norm_w or self.norm)
        rows, columns = (
            strip_gate(
                strip,
                conv.weight,
                norm.weight,
                norm.bias,
                norm_groups=self.norm_groups,
                eps=norm.eps,
                activation="silu" if self.variant == "timm" else None,
            )
            for strip, (conv, norm) in zip(strip_means(x), branches, strict=True)
        )
        return rows, columns

    def forward(self, x: Tensor, return_gates: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Feature maps `[b c h w]` to the same shape; with return_gates also the gates `[b c h]`, `[b c w]`.

        Raises ValueError for another number of axes or channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"EfficientLocalAttention: x is {tuple(x.shape)}; expected [batch, {self.channels}, height, width]"
            )
        rows, columns = self.gates(x)
        out = gate_axes(x, rows, columns)
        return (out, (rows, columns)) if return_gates else out


ELA = EfficientLocalAttention
