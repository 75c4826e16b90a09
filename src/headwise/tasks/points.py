"""Point clouds into a few tokens: farthest-point sampling, nearest neighbours, groups, coarse and fine scene tokens.

    next point = argmax over points of the distance to the nearest point taken so far
    token = mean feature of the k nearest points of a centre

The paper's scenes: 128 coarse tokens of 384 points each out of 40,000, and in the 1,500 points around each centre four
fine tokens of 375 points.

Paper: headwise/papers/lscenellm.py (Zhi et al., CVPR 2025).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PointGroups", "SceneTokens", "farthest_points", "group_points", "nearest_points", "scene_tokens"]

BLOCK = 256  # centres whose distances to all points exist at one time


@dataclass(frozen=True)
class PointGroups:
    """centers, features: of each group, the mean over its points. indices: its points, nearest first."""

    centers: Float[Tensor, "b g 3"]
    features: Float[Tensor, "b g f"]
    indices: Int[Tensor, "b g k"]


@dataclass(frozen=True)
class SceneTokens:
    """A scene as a language model gets it. parent: the coarse token of every fine one."""

    coarse: Float[Tensor, "b c f"]
    centers: Float[Tensor, "b c 3"]
    fine: Float[Tensor, "b n f"]
    fine_centers: Float[Tensor, "b n 3"]
    parent: Int[Tensor, "b n"]


def farthest_points(points: Float[Tensor, "b n 3"], count: int, *, start: int = 0) -> Int[Tensor, "b k"]:
    """Indices of `count` points that lie far from each other, from point `start` on; of equal distances the first.

    O(n count). Raises ValueError for more points than there are, fewer than one and a start that is not there.
    """
    b, n, _ = points.shape
    if not 1 <= count <= n:
        raise ValueError(f"farthest_points: count is {count}; expected 1 to {n}, the number of points")
    if not 0 <= start < n:
        raise ValueError(f"farthest_points: start is {start}; expected 0 to {n - 1}")
    chosen = torch.full((b, count), start, dtype=torch.long, device=points.device)
    nearest = torch.full((b, n), torch.inf, dtype=points.dtype, device=points.device)
    for step in range(1, count):
        last = points.gather(1, chosen[:, step - 1, None, None].expand(-1, 1, 3))
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        chosen[:, step] = nearest.argmax(-1)
    return chosen


def nearest_points(points: Float[Tensor, "b n 3"], centers: Float[Tensor, "b g 3"], count: int) -> Int[Tensor, "b g k"]:
    """Indices of the `count` points nearest to each centre, nearest first; of equal distances the first.

    Raises ValueError for a number out of range.
    """
    n = points.shape[1]
    if not 1 <= count <= n:
        raise ValueError(f"nearest_points: count is {count}; expected 1 to {n}, the number of points")
    found = [
        (block[:, :, None] - points[:, None]).square().sum(-1).sort(dim=-1, stable=True).indices[..., :count]
        for block in centers.split(BLOCK, 1)
    ]
    return torch.cat(found, 1)


def _rows(x: Float[Tensor, "b n f"], indices: Int[Tensor, "b g k"]) -> Float[Tensor, "b g k f"]:
    b, g, k = indices.shape
    return x.gather(1, indices.reshape(b, g * k, 1).expand(-1, -1, x.shape[2])).view(b, g, k, x.shape[2])


def group_points(
    points: Float[Tensor, "b n 3"],
    features: Float[Tensor, "a m f"],
    groups: int,
    size: int,
    *,
    centers: Float[Tensor, "b g 3"] | None = None,
) -> PointGroups:
    """Farthest-point centres and the mean feature of the `size` points nearest to each; groups may overlap.

    centers: places of one's own instead of sampled ones; `groups` must be their number.
    """
    if features.shape[:2] != points.shape[:2]:
        raise ValueError(
            f"group_points: {points.shape[1]} points in {len(points)} scenes but features of {features.shape[1]} in "
            f"{len(features)}; they must match"
        )
    if centers is None:
        centers = _rows(points, farthest_points(points, groups)[..., None])[:, :, 0]
    elif centers.shape[1] != groups:
        raise ValueError(f"group_points: groups is {groups} but there are {centers.shape[1]} centers; they must match")
    indices = nearest_points(points, centers, size)
    return PointGroups(centers, _rows(features, indices).mean(2), indices)


def scene_tokens(
    points: Float[Tensor, "b n 3"],
    features: Float[Tensor, "b n f"],
    *,
    coarse: int = 128,
    coarse_size: int = 384,
    fine: int = 4,
    around: int = 1500,
    dense: tuple[Float[Tensor, "b m 3"], Float[Tensor, "b m f"]] | None = None,
) -> SceneTokens:
    """Coarse tokens of a scene, and `fine` tokens of the `around` points about the centre of each.

    coarse_size: points of a coarse token; a fine one has around / fine of them. dense: points and features of a denser
    sample of the same scene, from which the fine tokens are made; None takes the same points.
    Raises ValueError where `around` is no multiple of `fine`, and for numbers beyond the points.
    """
    if fine < 1 or around % fine:
        raise ValueError(f"scene_tokens: around is {around} and fine {fine}; the fine tokens share these points evenly")
    groups = group_points(points, features, coarse, coarse_size)
    all_points, all_features = (points, features) if dense is None else dense
    near = nearest_points(all_points, groups.centers, around)
    b, f = len(points), features.shape[2]
    local, local_features = _rows(all_points, near).flatten(0, 1), _rows(all_features, near).flatten(0, 1)
    inner = group_points(local, local_features, fine, around // fine)
    parent = torch.arange(coarse, device=points.device).repeat_interleave(fine).expand(b, -1)
    shape = (b, coarse * fine)
    return SceneTokens(
        groups.features, groups.centers, inner.features.view(*shape, f), inner.centers.view(*shape, 3), parent
    )
