"""The outlines, textures and colours that scenes are drawn with, in an object's own frame (radius about 1)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["SHAPES", "TEXTURES", "coverage", "hsv_to_rgb", "object_frame", "pattern"]


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(slope * x - y / 2, -slope * x - y / 2), y) - 0.6


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    a, b = 1.1, 0.6  # to first order: the implicit function over the length of its gradient
    size = torch.hypot(x / a, y / b)
    return size * (size - 1) / torch.hypot(x / a**2, y / b**2).clamp_min(1e-6)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _plus(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.33, torch.maximum(x, y) - 1)


def _star(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - (0.72 + 0.28 * torch.cos(5 * torch.atan2(y, x)))


SHAPES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ellipse": _ellipse,
    "ring": _ring,
    "plus": _plus,
    "star": _star,
}
TEXTURES = ("plain", "stripes", "checker", "ramp")


def object_frame(
    points: Float[Tensor, "h w 2"],
    center: Float[Tensor, "n t m 2"],
    angle: Float[Tensor, "n t m"],
    scale: Float[Tensor, "n _ m"],
) -> Float[Tensor, "n t m h w 2"]:
    """Points in the frames of objects: turned back by the angle about the centre, in radii."""
    away = (points - center[..., None, None, :]) / scale[..., None, None, None]
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = away.unbind(-1)
    return torch.stack([cos * x + sin * y, cos * y - sin * x], -1)


def coverage(
    shape: Int[Tensor, "n t m"], frame: Float[Tensor, "n t m h w 2"], radius: Float[Tensor, "n t m"]
) -> Float[Tensor, "n t m h w"]:
    """The share of each pixel inside an outline, antialiased over one pixel. radius: in pixels."""
    x, y = frame.unbind(-1)
    out = torch.empty_like(x)
    for number, outline in enumerate(SHAPES.values()):
        chosen = shape == number
        if chosen.any():
            out[chosen] = outline(x[chosen], y[chosen])
    return (0.5 - out * radius[..., None, None]).clamp(0, 1)


def pattern(
    texture: Int[Tensor, "n t m"], frame: Float[Tensor, "n t m h w 2"], frequency: Float[Tensor, "n _ m"]
) -> Float[Tensor, "n t m h w"]:
    """A value in [-1, 1] at each point of an object; 1 all over for a plain one."""
    x, y = frame.unbind(-1)
    f = frequency[..., None, None]
    kind = texture[..., None, None]
    out = torch.ones_like(x)
    out = torch.where(kind == 1, torch.sin(f * x), out)
    out = torch.where(kind == 2, torch.sin(f * x) * torch.sin(f * y), out)
    return torch.where(kind == 3, x.clamp(-1, 1), out)


def hsv_to_rgb(hue: Float[Tensor, "*b"], saturation: float, value: float) -> Float[Tensor, "*b 3"]:
    """Colours of a hue in [0, 1), at one saturation and value."""
    turns = (hue[..., None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value - value * saturation * torch.minimum(torch.minimum(turns, 4 - turns), torch.ones(())).clamp_min(0)
