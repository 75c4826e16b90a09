"""Re-identification: find the other images of somebody, taken by other cameras.

`reid_metrics` is Market-1501's protocol: images of the query's identity by the query's own camera do not count.
`identity_images` draws small people whose parts are known; `read_market` lists the images of Market-1501 and
DukeMTMC-reID by their file names.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "PARTS",
    "IdentityImages",
    "MarketImage",
    "identity_batches",
    "identity_images",
    "read_market",
    "reid_metrics",
]

PARTS = ("background", "head", "torso", "legs", "bag")
SIZE = (24, 12)
JUNK = -1  # Market-1501's identity of images that do not count


def reid_metrics(
    query: Float[Tensor, "q c"],
    gallery: Float[Tensor, "g c"],
    *,
    query_identities: Int[Tensor, " q"],
    gallery_identities: Int[Tensor, " g"],
    query_cameras: Int[Tensor, " q"],
    gallery_cameras: Int[Tensor, " g"],
    ranks: Sequence[int] = (1, 5, 10),
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> dict[str, float]:
    """Mean average precision ("mAP") and the cumulative match curve ("rank-1", ...), shares from 0 to 1.

    For each query the gallery is ordered by distance, ties by its order. Left out: images of the same identity by the
    same camera, and those of identity -1 (junk). A query with no image left to find does not count ("queries" says how
    many do). Average precision is the mean of the precision at each image that is found.
    Raises ValueError for lengths that do not match, an unknown metric, and where no query counts.
    """
    for name, features, ids, cameras in (
        ("query", query, query_identities, query_cameras),
        ("gallery", gallery, gallery_identities, gallery_cameras),
    ):
        if not len(features) == len(ids) == len(cameras):
            raise ValueError(
                f"reid_metrics: {name} has {len(features)} features, {len(ids)} identities and {len(cameras)} cameras; "
                "they must match"
            )
    distance = _distances(query, gallery, metric)
    same = query_identities[:, None] == gallery_identities[None]
    ignored = (same & (query_cameras[:, None] == gallery_cameras[None])) | (gallery_identities == JUNK)[None]
    order = distance.masked_fill(ignored, torch.inf).sort(dim=1, stable=True).indices
    found = (same & ~ignored).gather(1, order).double()
    counted = found.sum(1) > 0
    if not bool(counted.any()):
        raise ValueError("reid_metrics: no query has an image of its identity by another camera in the gallery")
    found = found[counted]
    precision = found.cumsum(1) / torch.arange(1, found.shape[1] + 1, dtype=found.dtype, device=found.device)
    average = (precision * found).sum(1) / found.sum(1)
    first = found.argmax(1)
    curve = {f"rank-{rank}": float((first < rank).double().mean()) for rank in ranks}
    return {"mAP": float(average.mean()), **curve, "queries": float(counted.sum())}


def _distances(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        normal = torch.nn.functional.normalize
        return -(normal(query.double(), dim=1) @ normal(gallery.double(), dim=1).mT)
    if metric == "euclidean":
        return torch.cdist(query.double(), gallery.double(), compute_mode="donot_use_mm_for_euclid_dist")
    raise ValueError(f"reid_metrics: metric is {metric!r}; expected 'cosine' or 'euclidean'")


@dataclass(frozen=True)
class IdentityImages:
    """Images `[n 3 h w]` in [0, 1], whose they are, which camera took them, and the part of each pixel (`PARTS`)."""

    images: Float[Tensor, "n 3 h w"]
    identities: Int[Tensor, " n"]
    cameras: Int[Tensor, " n"]
    parts: Int[Tensor, "n h w"]

    def of_cameras(self, cameras: Sequence[int]) -> "IdentityImages":
        """The images of some cameras."""
        kept = torch.isin(self.cameras, torch.tensor(list(cameras)))
        return IdentityImages(self.images[kept], self.identities[kept], self.cameras[kept], self.parts[kept])


def identity_images(
    identities: Sequence[int], *, cameras: int = 4, per_camera: int = 2, seed: int = 0
) -> IdentityImages:
    """People of 24 x 12 pixels, each seen `per_camera` times by every camera; identity i is the same for every seed.

    People share five colours of clothes, so that they differ in small things: the hues' shades, a stripe across the
    torso and its height, and a bag, its colour and side. A camera has a background of its own, whose patches have the
    colours of clothes, and a cast; each image has its own place of the person, brightness, noise and clutter.
    The returned identities count from 0 in the order given. seed draws everything but the people.
    Raises ValueError for no identities, and for fewer than two cameras.
    """
    if not identities or cameras < 2 or per_camera < 1:
        raise ValueError(
            f"identity_images: {len(identities)} identities, cameras {cameras}, per_camera {per_camera}; expected at "
            "least one identity, two cameras and one image each"
        )
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    places = [_Camera.of(7919 * seed + camera) for camera in range(cameras)]
    images, parts, ids, taken = [], [], [], []
    for number, identity in enumerate(identities):
        person = _Person.of(identity)
        for camera, place in enumerate(places):
            for _ in range(per_camera):
                image, part = _photograph(person, place, generator)
                images.append(image)
                parts.append(part)
                ids.append(number)
                taken.append(camera)
    return IdentityImages(torch.stack(images), torch.tensor(ids), torch.tensor(taken), torch.stack(parts))


CLOTHES = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.6, 0.3], [0.2, 0.3, 0.8], [0.8, 0.7, 0.2], [0.5, 0.5, 0.5]])


class _Person(NamedTuple):
    torso: Tensor
    legs: Tensor
    hair: Tensor
    stripe: Tensor
    stripe_row: int
    bag: Tensor
    bag_side: int  # 0 none, 1 left, 2 right

    @classmethod
    def of(cls, identity: int) -> "_Person":
        rng = torch.Generator().manual_seed(104_729 * (identity + 1))

        def cloth() -> Tensor:
            chosen = CLOTHES[int(torch.randint(len(CLOTHES), (1,), generator=rng))]
            return (chosen + 0.16 * (torch.rand(3, generator=rng) - 0.5)).clamp(0, 1)

        def number(stop: int) -> int:
            return int(torch.randint(stop, (1,), generator=rng))

        hair = torch.tensor([0.1, 0.08, 0.06]) + 0.5 * torch.rand(1, generator=rng)
        return cls(cloth(), cloth(), hair, cloth(), number(6), cloth(), number(3))


class _Camera(NamedTuple):
    cast: Tensor
    ground: Tensor
    patches: Tensor  # [3 h w], a background of coloured rectangles

    @classmethod
    def of(cls, seed: int) -> "_Camera":
        rng = torch.Generator().manual_seed(15_485_863 + seed)
        ground = torch.rand(3, generator=rng) * 0.5 + 0.2
        wall = ground[:, None, None].expand(3, *SIZE).clone()
        for _ in range(6):
            _rectangle(wall, rng)
        return cls(0.85 + 0.3 * torch.rand(3, generator=rng), ground, wall)


def _rectangle(image: Tensor, rng: torch.Generator) -> None:
    """Draw a rectangle of a cloth's colour somewhere."""
    height, width = image.shape[1:]
    top, left, tall, wide = (
        int(torch.randint(stop, (1,), generator=rng)) for stop in (height - 2, width - 2, height // 4, width // 3)
    )
    colour = CLOTHES[int(torch.randint(len(CLOTHES), (1,), generator=rng))]
    image[:, top : top + 2 + tall, left : left + 2 + wide] = colour[:, None, None]


def _photograph(person: _Person, camera: _Camera, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    image, part = camera.patches.clone(), torch.zeros(SIZE, dtype=torch.long)
    for _ in range(2):
        _rectangle(image, rng)  # clutter of this moment
    top = 1 + int(torch.randint(3, (1,), generator=rng))
    left = 2 + int(torch.randint(3, (1,), generator=rng))

    def paint(name: str, rows: tuple[int, int], columns: tuple[int, int], colour: Tensor) -> None:
        area = (slice(top + rows[0], top + rows[1]), slice(left + columns[0], left + columns[1]))
        image[(slice(None), *area)] = colour[:, None, None]
        part[area] = PARTS.index(name)

    paint("head", (0, 4), (1, 5), person.hair)
    paint("torso", (4, 12), (0, 6), person.torso)
    paint("torso", (4 + person.stripe_row, 6 + person.stripe_row), (0, 6), person.stripe)
    paint("legs", (12, 20), (0, 6), person.legs)
    if person.bag_side:
        side = (0, 2) if person.bag_side == 1 else (4, 6)
        paint("bag", (9, 13), side, person.bag)
    bright = 0.8 + 0.4 * torch.rand(1, generator=rng)
    noise = 0.04 * torch.randn(image.shape, generator=rng)
    return (image * camera.cast[:, None, None] * bright + noise).clamp(0, 1), part


def identity_batches(
    data: IdentityImages, identities: int = 8, images: int = 4
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """`(step, generator) -> (images, identities)`: for the triplet loss, `images` of each of `identities` people.

    Raises ValueError where there are fewer people than asked for.
    """
    by_identity = [torch.nonzero(data.identities == one).flatten() for one in data.identities.unique().tolist()]
    if len(by_identity) < identities:
        raise ValueError(f"identity_batches: identities is {identities}, the data has {len(by_identity)}")

    def draw(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = []
        for one in torch.randperm(len(by_identity), generator=generator)[:identities].tolist():
            own = by_identity[one]
            enough = torch.randperm(len(own), generator=generator)[:images]
            if len(enough) < images:
                enough = torch.randint(len(own), (images,), generator=generator)
            rows.append(own[enough])
        index = torch.cat(rows)
        return data.images[index], data.identities[index]

    return draw


class MarketImage(NamedTuple):
    """One image file: its path, the identity (-1 is junk, 0 a distractor) and the camera, from 0."""

    path: Path
    identity: int
    camera: int


_MARKET = re.compile(r"^(-?\d+)_c(\d+)")


def read_market(folder: str | Path) -> list[MarketImage]:
    """The images of one folder of Market-1501 or DukeMTMC-reID (`query`, `bounding_box_test`, `bounding_box_train`).

    Their names say `IDENTITY_cCAMERA...`: `0002_c1s1_000451_03.jpg`, `0001_c2_f0046182.jpg`. Files of other names are
    skipped; a folder with none raises ValueError.
    """
    found = []
    for path in sorted(Path(folder).glob("*.jpg")):
        said = _MARKET.match(path.name)
        if said:
            found.append(MarketImage(path, int(said[1]), int(said[2]) - 1))
    if not found:
        raise ValueError(
            f"read_market: {folder} has no image named as 0002_c1s1_000451_03.jpg; give one of its folders"
        )
    return found
