"""Re-identification with dual cross-attention (DCAL): find a person's or a vehicle's other images by other cameras.

A vision transformer is trained by transformers' Trainer on the identity's class and the triplet loss of each branch, in
batches of a few images of each of a few identities, and tested by Market-1501's protocol (mean average precision, the
cumulative match curve). Without `dual` it is the same network alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from headwise.errors import InputError
from headwise.models.dual_cross_attention import DualCrossAttention
from headwise.recipes._dual import wrap
from headwise.recipes._pictures import InMemory, Labelled, Pictures, open_pixels
from headwise.recipes._trainer import Progress, train_with
from headwise.tasks.reidentification import IdentityImages, MarketImage, identity_images, read_market, reid_metrics

__all__ = [
    "IdentitySampler",
    "IdentitySet",
    "SeenBy",
    "TrainedReidentification",
    "load_identities",
    "train_reidentification",
]

PEOPLE = 48  # drawn people for training, and as many others for testing
# Market-1501 and DukeMTMC-reID, then VeRi-776.
FOLDERS = (("bounding_box_train", "query", "bounding_box_test"), ("image_train", "image_query", "image_test"))


@dataclass(frozen=True)
class SeenBy:
    """Images with whose they are (-1 is junk, which does not count) and the camera that took each."""

    images: Labelled
    identities: tuple[int, ...]
    cameras: tuple[int, ...]


@dataclass(frozen=True)
class IdentitySet:
    """Images `[c h w]` in [0, 1]: of identities 0 to n - 1 to train on, and queries and a gallery of others."""

    name: str
    train: Labelled
    identities: tuple[int, ...]  # of each training image
    query: SeenBy
    gallery: SeenBy
    size: tuple[int, int, int]

    @property
    def people(self) -> int:
        """How many identities there are to train on."""
        return max(self.identities) + 1


@dataclass(frozen=True)
class TrainedReidentification:
    """A trained network and how well it finds: "mAP", "rank-1", "rank-5", "rank-10" as shares, "queries" that count.

    metrics: by the class tokens of self-attention and GLCA side by side. alone: by self-attention's alone, which costs
    nothing more than the backbone.
    """

    model: DualCrossAttention
    metrics: dict[str, float]
    alone: dict[str, float]
    parameters: int


def load_identities(source: str, *, size: tuple[int, int] | None = None, seed: int = 0) -> IdentitySet:
    """Images of identities.

    source: "people" (drawn, 24 x 12 pixels, 48 people by 4 cameras to train on and 48 others), or a folder laid out as
    Market-1501 and DukeMTMC-reID (`bounding_box_train`, `query`, `bounding_box_test`) or VeRi-776 (`image_train`, ...),
    with pictures named as `0002_c1s1_000451_03.jpg`. Identity 0 is a distractor: it stays in the gallery and is never
    right; -1 is junk, which the protocol leaves out; neither is trained on or asked for. size: (height, width) that
    pictures are resized to; 256 x 128 unless given.
    Raises InputError for a folder that holds no such pictures.
    """
    if source == "people":
        if size is not None:
            raise InputError(f"size: people are drawn with 24 x 12 pixels; leave out {size[0]}x{size[1]}")
        return _drawn(seed)
    return _folder(Path(source), size or (256, 128))


def _drawn(seed: int) -> IdentitySet:
    train = identity_images(range(PEOPLE), seed=2 * seed)
    held = identity_images(range(PEOPLE, 2 * PEOPLE), seed=2 * seed + 1)

    def seen(data: IdentityImages, which: slice) -> SeenBy:
        images = InMemory(data.images[which], data.identities[which])
        return SeenBy(images, tuple(data.identities[which].tolist()), tuple(data.cameras[which].tolist()))

    # Two images of a person by each camera: one asks, the other is in the gallery.
    return IdentitySet(
        "people",
        InMemory(train.images, train.identities),
        tuple(train.identities.tolist()),
        seen(held, slice(0, None, 2)),
        seen(held, slice(1, None, 2)),
        size=(3, train.images.shape[2], train.images.shape[3]),
    )


def _folder(root: Path, size: tuple[int, int]) -> IdentitySet:
    if not root.is_dir():
        raise InputError(f"data: {root} is no folder; expected people, or a folder as Market-1501's")
    parts = next((names for names in FOLDERS if all((root / name).is_dir() for name in names)), None)
    if parts is None:
        raise InputError(f"data: {root} has no {', '.join(FOLDERS[0])} (or {', '.join(FOLDERS[1])}) in it")
    train, query, gallery = (read_market(root / name) for name in parts)
    train, query = ([one for one in images if one.identity > 0] for images in (train, query))
    known = sorted({one.identity for one in train})
    if len(known) < 2:
        raise InputError(
            f"data: {root / parts[0]} holds {len(known)} identities; expected two or more, numbered from 1"
        )
    if not query:
        raise InputError(f"data: {root / parts[1]} asks for nobody; expected identities numbered from 1")
    number = {identity: index for index, identity in enumerate(known)}

    def pictures(images: Sequence[MarketImage], labels: Sequence[int]) -> Pictures:
        items = [(one.path, label) for one, label in zip(images, labels, strict=True)]
        return Pictures(items, lambda path: open_pixels(path, size))

    def seen(images: Sequence[MarketImage]) -> SeenBy:
        identities = tuple(one.identity for one in images)
        return SeenBy(pictures(images, identities), identities, tuple(one.camera for one in images))

    identities = tuple(number[one.identity] for one in train)
    return IdentitySet(root.name, pictures(train, identities), identities, seen(query), seen(gallery), size=(3, *size))


class IdentitySampler(Sampler[int]):
    """Numbers of images in which every batch holds `images` of each of batch / images identities.

    An identity with fewer images repeats some. All identities come before one comes again; the order is drawn from seed
    and how often it was asked for. One pass has as many numbers as there are images, in whole batches.
    Raises ValueError for a batch that images do not divide, one of a single identity, and too few identities.
    """

    def __init__(self, identities: Sequence[int], *, batch: int, images: int = 4, seed: int = 0) -> None:
        self.of: dict[int, list[int]] = {}
        for index, identity in enumerate(identities):
            self.of.setdefault(identity, []).append(index)
        self.batch, self.images, self.seed, self.passes = batch, images, seed, 0
        each = batch // images if images else 0
        if batch % max(1, images) or not 2 <= each <= len(self.of):
            raise ValueError(
                f"IdentitySampler: batch {batch} of {images} images each; expected a multiple of it with 2 to "
                f"{len(self.of)} identities, as many as the data has"
            )
        self.length = max(1, len(identities) // batch) * batch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.passes)
        self.passes += 1
        waiting: list[int] = []
        for _ in range(self.length // self.batch):
            each = self.batch // self.images
            if len(waiting) < each:  # those that wait come first, the new round without them after
                order = torch.randperm(len(self.of), generator=generator).tolist()
                names = [list(self.of)[place] for place in order]
                waiting += [name for name in names if name not in set(waiting)]
            chosen, waiting = waiting[:each], waiting[each:]
            for identity in chosen:
                own = self.of[identity]
                order = torch.randperm(len(own), generator=generator)[: self.images]
                if len(own) < self.images:
                    order = torch.randint(len(own), (self.images,), generator=generator)
                yield from (own[place] for place in order.tolist())


def train_reidentification(
    data: IdentitySet,
    *,
    dual: bool = True,
    backbone: str | None = None,
    local_ratio: float = 0.3,
    steps: int = 500,
    batch: int = 32,
    images: int = 4,
    learning_rate: float | None = None,
    weight_decay: float = 0.05,
    out: str | Path | None = None,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedReidentification:
    """Train one network and test it. dual: False trains the backbone alone, with the same losses, for comparison.

    backbone: a ViT, DeiT or DINOv2 of transformers by hub id or folder; None makes a small ViT with sizes in `network`.
    batch, images: of a step, and of each identity in it (the paper's are 64 and 4). learning_rate: None is 2e-3, with a
    backbone 3e-5. options: further ones of `DualCrossAttentionConfig`. training: further `TrainingArguments`; the
    paper's SGD is `{"optim": "sgd", "optim_args": "momentum=0.9"}`. out: folder that the model is written to.
    Raises InputError for a backbone that cannot be had, ValueError for a batch that does not fit the data.
    """
    from transformers import set_seed

    set_seed(seed)
    wrapped = wrap(
        data.size,
        data.people,
        dual=dual,
        backbone=backbone,
        network=network,
        local_ratio=local_ratio,
        objective="reidentification",
        **(options or {}),
    )
    train_with(
        wrapped.model,
        data.train,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate or (2e-3 if backbone is None else 3e-5),
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        warmup=0.2,
        training={"remove_unused_columns": False, **(training or {})},
        sampler=lambda size: IdentitySampler(data.identities, batch=size, images=images, seed=seed),
        progress=progress,
        data_collator=wrapped.collate,
    )
    query, gallery = (
        torch.cat([said.features.cpu() for said, _ in wrapped.read(part.images)]) for part in (data.query, data.gallery)
    )
    width = wrapped.model.config.backbone_config.hidden_size
    return TrainedReidentification(
        wrapped.model,
        _scores(data, query, gallery),
        _scores(data, query[:, :width], gallery[:, :width]),
        sum(p.numel() for p in wrapped.model.parameters()),
    )


def _scores(data: IdentitySet, query: Float[Tensor, "q c"], gallery: Float[Tensor, "g c"]) -> dict[str, float]:
    asked, kept = data.query, data.gallery
    return reid_metrics(
        query,
        gallery,
        query_identities=torch.tensor(asked.identities),
        gallery_identities=torch.tensor(kept.identities),
        query_cameras=torch.tensor(asked.cameras),
        gallery_cameras=torch.tensor(kept.cameras),
    )
