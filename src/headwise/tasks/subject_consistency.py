"""Pictures of several subjects, and how consistent a subject is from picture to picture, without any hub.

A scene holds up to five subjects on a grid of cells. What a prompt says of a subject is its shape, cell and size; its
*look*, a hue and a texture, is left open, as the fur of "a cat" is. In a share of the scenes all subjects have one
look. Similarity compares looks inside masks: joint colour histograms, and Haar features of small patches.

Paper: headwise/papers/isolation_reposition_attention.py (He et al., 2024), whose scores are DINO and CLIP-I in masks;
`subject_crops` makes the input of such encoders.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.scene_shapes import hsv_to_rgb

__all__ = [
    "SUBJECT_SHAPES",
    "SUBJECT_TEXTURES",
    "SubjectScenes",
    "colour_distance",
    "colour_histogram",
    "draw_subjects",
    "histogram_overlap",
    "mean_colours",
    "patch_features",
    "render_subjects",
    "same_subject",
    "subject_crops",
    "subject_leakage",
]

SUBJECT_SHAPES = ("square", "disc", "triangle", "frame")
SUBJECT_TEXTURES = ("plain", "rows", "columns", "checks")
GRID, CELL = 3, 6  # cells a side, pixels a cell
SIZES = (4, 6)  # of a subject, in pixels
MOST = 5  # subjects in a scene
DARK = 0.3  # brightness of the dark pixels of a texture


@dataclass(frozen=True)
class SubjectScenes:
    """n scenes with up to s subjects. An absent subject has cell -1, shape -1 and an empty mask.

    images: in [-1, 1]. cells: row * 3 + column. sizes: 0 or 1, for 4 or 6 pixels. masks: the pixels of each subject.
    boxes: its square, from the top left corner of its cell. hues: in [0, 1). textures: places in SUBJECT_TEXTURES.
    """

    images: Float[Tensor, "n 3 p p"]
    shapes: Int[Tensor, "n s"]
    cells: Int[Tensor, "n s"]
    sizes: Int[Tensor, "n s"]
    hues: Float[Tensor, "n s"]
    textures: Int[Tensor, "n s"]
    masks: Bool[Tensor, "n s p p"]
    boxes: Bool[Tensor, "n s p p"]


def draw_subjects(
    n: int, generator: torch.Generator, *, subjects: tuple[int, int] = (1, MOST), shared: float = 0.5
) -> SubjectScenes:
    """n random scenes. subjects: least and greatest number. shared: share of scenes in which all have one look.

    Raises ValueError for numbers of subjects outside 1 to 5 and a share outside 0 to 1.

    >>> draw_subjects(4, torch.Generator().manual_seed(0), subjects=(2, 2)).images.shape
    torch.Size([4, 3, 18, 18])
    """
    low, high = subjects
    if not 1 <= low <= high <= MOST:
        raise ValueError(f"draw_subjects: subjects is {subjects}; expected 1 <= least <= greatest <= {MOST}")
    if not 0 <= shared <= 1:
        raise ValueError(f"draw_subjects: shared is {shared}; expected a share from 0 to 1")

    def whole(most: int) -> Tensor:
        return torch.randint(most, (n, MOST), generator=generator)

    shapes, sizes, textures = whole(len(SUBJECT_SHAPES)), whole(len(SIZES)), whole(len(SUBJECT_TEXTURES))
    cells = torch.rand(n, GRID**2, generator=generator).argsort(1)[:, :MOST]
    hues = torch.rand(n, MOST, generator=generator)
    alike = torch.rand(n, 1, generator=generator) < shared
    hues, textures = torch.where(alike, hues[:, :1], hues), torch.where(alike, textures[:, :1], textures)
    count = torch.randint(low, high + 1, (n, 1), generator=generator)
    absent = torch.arange(MOST) >= count
    shapes, cells = shapes.masked_fill(absent, -1), cells.masked_fill(absent, -1)
    grounds = -0.9 + 0.4 * torch.rand(n, generator=generator)
    return render_subjects(shapes, cells, sizes, hues, textures, grounds)


def render_subjects(
    shapes: Int[Tensor, "n s"],
    cells: Int[Tensor, "n s"],
    sizes: Int[Tensor, "n s"],
    hues: Float[Tensor, "n s"],
    textures: Int[Tensor, "n s"],
    grounds: Float[Tensor, " n"] | None = None,
) -> SubjectScenes:
    """Draw given subjects. grounds: the grey of each background, in [-1, 1]; None means -0.7."""
    n, s = shapes.shape
    side = GRID * CELL
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    size = torch.tensor(SIZES)[sizes][..., None, None]
    top, left = ((place * CELL)[..., None, None] for place in (cells.div(GRID, rounding_mode="floor"), cells % GRID))
    dy, dx = y - top, x - left  # n s p p, from the corner of the cell
    boxes = (dy >= 0) & (dy < size) & (dx >= 0) & (dx < size) & (cells >= 0)[..., None, None]
    v, u = (dy - (size - 1) / 2).abs(), (dx - (size - 1) / 2).abs()  # from the middle of the subject
    half = size / 2
    inside = torch.stack(
        [
            torch.ones_like(boxes),
            v.square() + u.square() <= half.square(),
            dy >= dx,
            torch.maximum(v, u) > half / 2,
        ],
        2,
    )
    pick = shapes.clamp_min(0)[..., None, None, None].expand(n, s, 1, side, side)
    masks = boxes & inside.gather(2, pick)[:, :, 0]
    dark = torch.stack([torch.zeros_like(boxes), dy % 2 == 1, dx % 2 == 1, (dy + dx) % 2 == 1], 2)
    pick = textures[..., None, None, None].expand(n, s, 1, side, side)
    light = torch.where(dark.gather(2, pick)[:, :, 0], DARK, 1.0)
    colour = 2 * hsv_to_rgb(hues, 0.9, 1.0)[..., None, None] * light[:, :, None] - 1  # n s 3 p p
    images = (torch.full((n,), -0.7) if grounds is None else grounds)[:, None, None, None].expand(n, 3, side, side)
    for i in range(s):
        images = torch.where(masks[:, i, None], colour[:, i], images)
    return SubjectScenes(images.contiguous(), shapes, cells, sizes, hues, textures, masks, boxes)


def mean_colours(images: Float[Tensor, "n c p w"], masks: Bool[Tensor, "n s p w"]) -> Float[Tensor, "n s c"]:
    """The mean colour inside each mask; NaN for an empty one."""
    weight = masks.to(images.dtype)
    return torch.einsum("ncpw,nspw->nsc", images, weight) / weight.sum((-2, -1))[..., None]


def colour_histogram(
    images: Float[Tensor, "n 3 p w"], masks: Bool[Tensor, "n s p w"], bins: int = 6
) -> Float[Tensor, "n s k"]:
    """Joint colour histograms with bins ** 3 cells inside masks, each summing to 1; all 0 for an empty mask.

    Values are clamped to [-1, 1]. Each pixel is shared among the neighbouring bins in proportion to its nearness, so
    that a small change of colour is a small change of the histogram.
    """
    if bins < 2:
        raise ValueError(f"colour_histogram: bins is {bins}; expected 2 or more")
    place = (images.clamp(-1, 1) + 1) / 2 * (bins - 1)
    near = (1 - (place[:, :, None] - torch.arange(bins, device=images.device)[:, None, None]).abs()).clamp_min(0)
    joint = torch.einsum("nipw,njpw,nkpw->nijkpw", *near.unbind(1)).flatten(1, 3)
    weight = masks.to(images.dtype)
    total = weight.sum((-2, -1)).clamp_min(1)
    return torch.einsum("nkpw,nspw->nsk", joint, weight) / total[..., None]


def histogram_overlap(a: Float[Tensor, "n s k"], b: Float[Tensor, "n r k"]) -> Float[Tensor, "n s r"]:
    """The shared mass of each pair of histograms: 1 where they are alike, 0 where no bin is in both."""
    return torch.minimum(a[:, :, None], b[:, None]).sum(-1)


def patch_features(images: Float[Tensor, "n c p w"], masks: Bool[Tensor, "n s p w"]) -> Float[Tensor, "n s f"]:
    """The look inside masks: mean colour and mean absolute Haar details of 2 x 2 patches, 4 figures a channel.

    A patch counts where all its four pixels are in the mask; a mask without any such patch has details 0. The details
    say how strong a texture is, and whether its edges run along rows, columns or both.
    """
    a, b, c, d = (images[:, :, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1))
    details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d]).abs() / 4  # rows, columns, checks
    whole = masks[..., :-1, :-1] & masks[..., :-1, 1:] & masks[..., 1:, :-1] & masks[..., 1:, 1:]
    weight = whole.to(images.dtype)
    means = torch.einsum("kncpw,nspw->nskc", details, weight) / weight.sum((-2, -1)).clamp_min(1)[..., None, None]
    return torch.cat([mean_colours(images, masks), means.flatten(2)], -1)


def subject_crops(
    images: Float[Tensor, "n c p w"], masks: Bool[Tensor, "n s p w"], size: int = 224, ground: float = 0.0
) -> Float[Tensor, "n s c size size"]:
    """Each subject alone, cut to its box, on a plain ground and resized: what DINO or CLIP are given in the paper.

    Raises ValueError for an empty mask, which has no box.
    """
    n, s = masks.shape[:2]
    if not bool(masks.flatten(2).any(-1).all()):
        raise ValueError(f"subject_crops: {int((~masks.flatten(2).any(-1)).sum())} masks are empty; leave them out")
    crops = []
    for i in range(n):
        for j in range(s):
            rows, columns = (masks[i, j].any(axis).nonzero().flatten() for axis in (1, 0))
            box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
            alone = torch.where(masks[i, j], images[i], ground)[:, box[0], box[1]]
            crops.append(F.interpolate(alone[None], (size, size), mode="bilinear", align_corners=False)[0])
    return torch.stack(crops).unflatten(0, (n, s))


def same_subject(
    images: Float[Tensor, "n c p w"],
    masks: Bool[Tensor, "n s p w"],
    references: Float[Tensor, "n r c p w"],
    reference_masks: Bool[Tensor, "n r p w"],
    *,
    features: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, "n s r"]:
    """How alike each subject of a picture and the subject of each reference picture are, 1 for the same look.

    features: `(images [n c p w], masks [n s p w]) -> [n s f]`, compared by cosine; None compares colour histograms.
    """
    n, r = reference_masks.shape[:2]
    describe = colour_histogram if features is None else features
    own = describe(images, masks)
    theirs = describe(references.flatten(0, 1), reference_masks.flatten(0, 1)[:, None]).reshape(n, r, -1)
    if features is None:
        return histogram_overlap(own, theirs)
    return F.cosine_similarity(own[:, :, None], theirs[:, None], dim=-1)


def subject_leakage(similarity: Float[Tensor, "n s s"]) -> Float[Tensor, " n"]:
    """How much a picture's subjects look like the references of *others*: the mean off the diagonal.

    Raises ValueError for fewer than two subjects.
    """
    s = similarity.shape[-1]
    if s < 2 or similarity.shape[-2] != s:
        raise ValueError(f"subject_leakage: similarity has shape {tuple(similarity.shape)}; expected [n, s, s], s >= 2")
    off = ~torch.eye(s, dtype=torch.bool, device=similarity.device)
    return similarity[:, off].mean(-1)


def colour_distance(images: Float[Tensor, "n c p w"], masks: Bool[Tensor, "n s p w"]) -> Float[Tensor, " n"]:
    """The mean distance between the mean colours of each two subjects of a picture: small where they have fused.

    In units of the images; raises ValueError for fewer than two subjects.
    """
    s = masks.shape[1]
    if s < 2:
        raise ValueError(f"colour_distance: masks has {s} subjects; expected 2 or more")
    colours = mean_colours(images, masks)
    apart = (colours[:, :, None] - colours[:, None]).norm(dim=-1)
    return apart.sum((-2, -1)) / (s * (s - 1))
