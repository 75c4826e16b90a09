"""Generated scenes of objects with exact masks: images and clips for object-centric and vision papers.

    scene = layered objects over a background;  w_m = c_m prod_{closer m'} (1 - c_m'),  image = sum_m w_m colour_m

Every object is a shape with a texture in its own frame, antialiased over one pixel; w are the visible masks, exact
under occlusion. Item i depends on (seed, i) alone, so that splits never overlap and workers agree.

Styles, in rising difficulty: "plain" has one hue for each object (grouping by colour solves it), "textured" one hue in
two brightnesses, "two_tone" two colours of a palette that objects share, so that colour does not tell them apart.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.scene_shapes import SHAPES, TEXTURES, coverage, hsv_to_rgb, object_frame, pattern

__all__ = ["ObjectScenes", "SceneStream", "object_scenes"]

STYLES = ("plain", "textured", "two_tone")
BACKGROUNDS = ("black", "grey", "gradient")
LAYOUTS = 8  # drawn for a scene; the first without a crowd is taken
ATTEMPTS = 30
VISIBLE = 0.25  # the least share of an object that must show in the first frame
APART = 0.55  # of the sum of two radii, between centres
PALETTE = 6
FIELDS = 24  # numbers drawn for an object besides its centres


@dataclass(frozen=True)
class ObjectScenes:
    """n scenes of T frames with M places for objects; lengths are shares of the side, angles radians.

    masks: visible coverage, background first, summing to 1. labels: arg-max of masks, 0 is the background. present:
    which places hold an object. visible: visible area over full area. depth: 0 is in front. velocity: a frame's step.
    flow: where the surface seen at a pixel has moved in the next frame, in pixels (x, y).
    """

    image: Float[Tensor, "n t 3 h w"]
    masks: Float[Tensor, "n t m1 h w"]
    labels: Int[Tensor, "n t h w"]
    present: Bool[Tensor, "n m"]
    center: Float[Tensor, "n t m 2"]
    box: Float[Tensor, "n t m 4"]
    visible: Float[Tensor, "n t m"]
    depth: Int[Tensor, "n m"]
    shape: Int[Tensor, "n m"]
    texture: Int[Tensor, "n m"]
    hue: Float[Tensor, "n m"]
    hue2: Float[Tensor, "n m"]
    scale: Float[Tensor, "n m"]
    angle: Float[Tensor, "n t m"]
    velocity: Float[Tensor, "n m 2"]
    flow: Float[Tensor, "n u 2 h w"]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Any) -> "ObjectScenes":
        """Some of the scenes; a number gives one, with n = 1."""
        index = slice(index, index + 1) if isinstance(index, int) and index >= 0 else index
        return ObjectScenes(**{item.name: getattr(self, item.name)[index] for item in fields(self)})


@dataclass(frozen=True)
class _Options:
    size: int
    frames: int
    min_objects: int
    max_objects: int
    style: str
    background: str
    shapes: tuple[str, ...]
    scale: tuple[float, float]
    speed: float
    camera: float
    looks: int | None
    seed: int


def object_scenes(
    n: int,
    *,
    size: int = 48,
    frames: int = 1,
    min_objects: int = 2,
    max_objects: int = 4,
    style: str = "two_tone",
    background: str = "gradient",
    shapes: Sequence[str] | None = None,
    scale: tuple[float, float] = (0.13, 0.24),
    speed: float = 0.04,
    camera: float = 0.0,
    same_looks: int | None = None,
    seed: int = 0,
    start: int = 0,
) -> ObjectScenes:
    """Scenes `start` to `start + n` of a seed.

    size: pixels of a side. shapes: names of `SHAPES`; None is all. scale: smallest and largest radius, as a share of
    the side. speed, camera: largest step of an object and of the camera in a frame, with reflection at the walls.
    same_looks: objects come in so many classes of looks (shape, texture and colours), over all scenes of the seed.
    Raises ValueError for what cannot be drawn.
    """
    options = _checked(
        _Options(
            size,
            frames,
            min_objects,
            max_objects,
            style,
            background,
            tuple(SHAPES if shapes is None else shapes),
            scale,
            speed,
            camera,
            same_looks,
            seed,
        ),
        n,
    )
    made = _draw(options, list(range(start, start + n)), 0)
    for attempt in range(1, ATTEMPTS):
        hidden = ((made.visible[:, 0] < VISIBLE) & made.present).any(1).nonzero()[:, 0].tolist()
        if not hidden:
            break
        again = _draw(options, [start + index for index in hidden], attempt)
        for item in fields(made):
            getattr(made, item.name)[hidden] = getattr(again, item.name)
    return made


class SceneStream(torch.utils.data.IterableDataset):
    """Scenes without end, one at a time and shared out among workers: a dict of tensors each, without the n axis.

    options: those of `object_scenes`. block: scenes drawn at once.
    """

    def __init__(self, *, block: int = 64, start: int = 0, **options: Any) -> None:
        super().__init__()
        object_scenes(0, **options)
        self.block, self.start, self.options = block, start, options

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        position = self.start + number
        while True:
            whole = object_scenes(self.block * workers, start=position - number, **self.options)
            for index in range(number, self.block * workers, workers):
                yield {item.name: getattr(whole, item.name)[index] for item in fields(whole)}
            position += self.block * workers


def _checked(o: _Options, n: int) -> _Options:
    for name, value, least in (
        ("n", n, 0),
        ("size", o.size, 8),
        ("frames", o.frames, 1),
        ("min_objects", o.min_objects, 0),
        ("max_objects", o.max_objects, max(1, o.min_objects)),
        ("same_looks", 1 if o.looks is None else o.looks, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"object_scenes: {name} is {value!r}; expected a whole number from {least}")
    if isinstance(o.seed, bool) or not isinstance(o.seed, int):
        raise ValueError(f"object_scenes: seed is {o.seed!r}; expected a whole number")
    for name, value, known in (("style", o.style, STYLES), ("background", o.background, BACKGROUNDS)):
        if value not in known:
            raise ValueError(f"object_scenes: {name} is {value!r}; choose {', '.join(known)}")
    if unknown := sorted(set(o.shapes) - set(SHAPES)):
        raise ValueError(f"object_scenes: shapes names {unknown[0]!r}; there are {', '.join(SHAPES)}")
    low, high = o.scale
    if not (0 < low <= high < 0.5) or not o.shapes:
        raise ValueError(
            f"object_scenes: scale is {o.scale}, shapes {list(o.shapes)}; radii lie in 0 < low <= high < 0.5"
        )
    if low * o.size < 2:
        raise ValueError(
            f"object_scenes: scale {low} of {o.size} pixels is a radius of {low * o.size:.1f}; objects need 2 or more"
        )
    return o


def _uniform(options: _Options, items: Sequence[int], attempt: int, count: int) -> Float[Tensor, "n k"]:
    """What each item draws: numbers that depend on the seed, the item and the attempt alone."""
    rows = []
    for item in items:
        digest = hashlib.blake2b(f"{options.seed}/{item}/{attempt}".encode(), digest_size=7).digest()
        rows.append(torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big"))))
    return torch.stack(rows) if rows else torch.empty(0, count)


def _draw(o: _Options, items: Sequence[int], attempt: int) -> ObjectScenes:
    n, m, t = len(items), o.max_objects, o.frames
    u = _uniform(o, items, attempt, 12 + m * (2 * LAYOUTS + FIELDS))
    scene, centres, own = u[:, :12], u[:, 12 : 12 + 2 * LAYOUTS * m], u[:, 12 + 2 * LAYOUTS * m :].view(n, m, FIELDS)
    count = o.min_objects + (scene[:, 0] * (m - o.min_objects + 1)).long().clamp_max(m - o.min_objects)
    present = torch.arange(m) < count[:, None]
    scale = o.scale[0] + own[..., 0] * (o.scale[1] - o.scale[0])
    first = _apart(0.1 + 0.8 * centres.view(n, LAYOUTS, m, 2), scale, present)
    depth = own[..., 1].argsort(1).argsort(1)

    looks = own[..., 2:12]
    if o.looks is not None:  # the classes of a seed are drawn once, under an item of their own
        table = _uniform(o, range(-1, -1 - o.looks, -1), 0, 10)
        looks = table[(own[..., 2] * o.looks).long().clamp_max(o.looks - 1)]
    allowed = torch.tensor([list(SHAPES).index(name) for name in o.shapes])
    shape = allowed[(looks[..., 0] * len(allowed)).long().clamp_max(len(allowed) - 1)]
    texture = torch.zeros_like(shape)
    if o.style != "plain":
        texture = 1 + (looks[..., 1] * (len(TEXTURES) - 1)).long().clamp_max(len(TEXTURES) - 2)
    frequency = math.pi * (2 + 3 * looks[..., 2])
    hue = looks[..., 3]
    if o.style != "two_tone" and o.looks is None:  # spread over the circle, so that objects differ
        hue = (scene[:, 1:2] + torch.arange(m) / m + 0.05 * looks[..., 3]) % 1
    hue2 = hue
    if o.style == "two_tone":
        one = (looks[..., 3] * PALETTE).long().clamp_max(PALETTE - 1)
        other = (one + 1 + (looks[..., 4] * (PALETTE - 1)).long().clamp_max(PALETTE - 2)) % PALETTE
        hue, hue2 = one / PALETTE, other / PALETTE

    direction = 2 * math.pi * own[..., 12]
    heading = torch.stack([direction.cos(), direction.sin()], -1)
    velocity = heading * (o.speed * own[..., 13, None]) if t > 1 else torch.zeros(n, m, 2)
    sway = 2 * math.pi * scene[:, 2]
    camera = torch.stack([sway.cos(), sway.sin()], -1) * o.camera * scene[:, 3, None]
    time = torch.arange(t, dtype=torch.float32)
    center = _reflect(first[:, None] + time[None, :, None, None] * velocity[:, None])
    center = center + (time[None, :, None] * camera[:, None])[:, :, None]
    spin = 0.3 * (own[..., 14] - 0.5) if t > 1 else torch.zeros(n, m)
    angle = 2 * math.pi * own[..., 15][:, None] + time[None, :, None] * spin[:, None]

    axis = (torch.arange(o.size) + 0.5) / o.size
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # h w (x, y)
    frame = object_frame(points, center, angle, scale[:, None])  # n t m h w 2
    cover = coverage(shape[:, None].expand(n, t, m), frame, scale[:, None].expand(n, t, m) * o.size)
    cover = cover * present[:, None, :, None, None]
    masks = _layers(cover, depth)
    weave = torch.tanh(3 * pattern(texture[:, None].expand(n, t, m), frame, frequency[:, None]))
    blend = (0.5 + 0.5 * weave)[:, :, :, None]
    if o.style == "two_tone":
        colours = [hsv_to_rgb(h, 0.85, 0.9)[:, None, :, :, None, None] for h in (hue, hue2)]
    else:
        light = [0.9, 0.9 if o.style == "plain" else 0.45]
        colours = [hsv_to_rgb(hue, 0.85, value)[:, None, :, :, None, None] for value in light]
    paint = blend * colours[0] + (1 - blend) * colours[1]  # n t m 3 h w
    ground = _background(o, scene, points)
    image = masks[:, :, :1] * ground[:, None] + (masks[:, :, 1:, None] * paint).sum(2)
    full = cover.sum((-1, -2))
    visible = torch.where(full > 0, masks[:, :, 1:].sum((-1, -2)) / full.clamp_min(1e-9), torch.zeros(()))
    return ObjectScenes(
        image=image.clamp(0, 1),
        masks=masks,
        labels=masks.argmax(2),
        present=present,
        center=center,
        box=_boxes(cover),
        visible=visible,
        depth=depth,
        shape=shape,
        texture=texture,
        hue=hue,
        hue2=hue2,
        scale=scale,
        angle=angle,
        velocity=velocity,
        flow=_flow(masks, points, center, angle, frame, scale, camera, o.size),
    )


def _apart(layouts: Tensor, scale: Tensor, present: Tensor) -> Float[Tensor, "n m 2"]:
    """The first layout without a crowd, or the least crowded one."""
    distance = (layouts[:, :, :, None] - layouts[:, :, None]).norm(dim=-1)
    needed = scale[:, :, None] + scale[:, None]
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(scale.shape[1], dtype=torch.bool)
    ratio = (distance / needed[:, None]).masked_fill(~pairs[:, None], torch.inf).amin((-1, -2))
    good = ratio > APART
    choice = torch.where(good.any(1), good.int().argmax(1), ratio.argmax(1))
    return layouts[torch.arange(len(layouts)), choice]


def _reflect(x: Tensor) -> Tensor:
    """Positions folded back into [0.1, 0.9], as by walls."""
    y = (x - 0.1) % 1.6
    return 0.1 + torch.minimum(y, 1.6 - y)


def _layers(cover: Float[Tensor, "n t m h w"], depth: Tensor) -> Float[Tensor, "n t m1 h w"]:
    """Visible coverage of the background and of each object, painted from the front to the back."""
    order = depth.argsort(1)[:, None, :, None, None].expand_as(cover)
    front = cover.gather(2, order)
    light = torch.cat([torch.ones_like(front[:, :, :1]), (1 - front).cumprod(2)], 2)
    seen = torch.empty_like(front).scatter_(2, order, front * light[:, :, :-1])
    return torch.cat([light[:, :, -1:], seen], 2)


def _background(o: _Options, scene: Tensor, points: Tensor) -> Float[Tensor, "n 3 h w"]:
    n = len(scene)
    if o.background == "black":
        return torch.zeros(n, 3, o.size, o.size)
    grey = (0.15 + 0.35 * scene[:, 4])[:, None, None]
    if o.background == "gradient":
        turn = 2 * math.pi * scene[:, 5]
        way = torch.stack([turn.cos(), turn.sin()], -1)
        grey = grey + 0.2 * ((points - 0.5) * way[:, None, None]).sum(-1)
    return grey.expand(n, o.size, o.size)[:, None].expand(n, 3, o.size, o.size)


def _boxes(cover: Float[Tensor, "n t m h w"]) -> Float[Tensor, "n t m 4"]:
    """x0, y0, x1, y1 of what an object covers, seen or not, as shares of the side; zeros where there is none."""
    size = cover.shape[-1]
    sides = []
    for axis in (-2, -1):
        line = (cover > 0.5).any(axis)
        low = line.int().argmax(-1)
        high = size - line.flip(-1).int().argmax(-1)
        sides.append((low.where(line.any(-1), 0), high.where(line.any(-1), 0)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], -1) / size


def _flow(
    masks: Tensor,
    points: Tensor,
    center: Tensor,
    angle: Tensor,
    frame: Tensor,
    scale: Tensor,
    camera: Tensor,
    size: int,
) -> Float[Tensor, "n u 2 h w"]:
    """Rigid motion of the visible surface, in closed form."""
    here = frame[:, :-1]
    cos, sin = angle[:, 1:].cos()[..., None, None], angle[:, 1:].sin()[..., None, None]
    turned = torch.stack([cos * here[..., 0] - sin * here[..., 1], sin * here[..., 0] + cos * here[..., 1]], -1)
    there = center[:, 1:, :, None, None] + scale[:, None, :, None, None, None] * turned
    moves = there - points
    still = camera[:, None, None, None, None].expand(*moves.shape[:2], 1, *moves.shape[3:])
    moves = torch.cat([still, moves], 2)
    label = masks[:, :-1].argmax(2)[:, :, None, ..., None].expand(*moves.shape[:2], 1, *moves.shape[3:])
    return size * moves.gather(2, label)[:, :, 0].permute(0, 1, 4, 2, 3)
