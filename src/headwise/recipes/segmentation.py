"""Segmentation with the backbone of your choice: generated scenes, or a folder of images and masks.

One `Segmenter` whose backbone is named, trained by transformers' Trainer, then measured on held-out images by mean IoU
and pixel accuracy. `compare_backbones` puts several into one table, each at the width at which it has about as many
parameters as the others.

A folder holds `images/` and `masks/` with files of the same name; a mask is a PNG of label numbers (grey or with a
palette), 255 for pixels that do not count. `train/` and `test/` (or `val/`) may each hold such a pair, and
`classes.txt` the classes' names, one a line.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headwise.errors import InputError
from headwise.models.segmenter import Segmenter, SegmenterConfig
from headwise.ops.counting import flops
from headwise.recipes._pictures import PICTURES, open_pixels
from headwise.recipes._trainer import Progress, train_with
from headwise.recipes.backbones import compare_sized, sized_backbone
from headwise.recipes.image_classification import HELD_OUT
from headwise.tasks.scene_shapes import SHAPES
from headwise.tasks.scenes import object_scenes
from headwise.tasks.segmentation import IGNORE, ClassScores, class_scores, class_table

__all__ = ["MaskSet", "TrainedSegmenter", "compare_backbones", "load_masks", "train_segmenter"]

SPLITS = ("test", "val", "validation")


class Masked(Dataset):
    """Images and their label maps by number, as the Trainer takes them."""

    def __len__(self) -> int:
        raise NotImplementedError


class _Scenes(Masked):
    def __init__(self, count: int, size: int, seed: int, start: int) -> None:
        made = object_scenes(count, size=size, seed=seed, start=start)
        kinds = torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + made.shape], 1)  # of the background, of places
        self.images = made.image[:, 0]
        self.labels = kinds.gather(1, made.labels[:, 0].flatten(1)).view(count, size, size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class _Files(Masked):
    def __init__(self, pairs: Sequence[tuple[Path, Path]], size: int, classes: int) -> None:
        self.pairs, self.size, self.classes = pairs, size, classes

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import numpy
        from PIL import Image

        image, mask = self.pairs[index]
        side = (self.size, self.size)
        with opened(mask) as picture:
            labels = numpy.array(picture.resize(side, Image.Resampling.NEAREST), dtype=numpy.int64)
        _check_labels(mask, set(numpy.unique(labels).tolist()), self.classes)
        return {"pixel_values": open_pixels(image, side), "labels": torch.from_numpy(labels)}


@dataclass(frozen=True)
class MaskSet:
    """Images `[3 h w]` in [0, 1] with label maps `[h w]`, for training and for testing. size: side in pixels."""

    name: str
    train: Masked
    test: Masked
    classes: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class TrainedSegmenter:
    """A trained network, its scores on the test images, and what it costs.

    iou: of each class by name; None for one that no test image has. flops: of one image, two for each
    multiply-accumulate, by counting.
    """

    model: Segmenter
    miou: float
    pixel_accuracy: float
    iou: dict[str, float | None]
    parameters: int
    flops: int
    loss: float


def load_masks(source: str, *, size: int = 48, train: int = 800, classes: int | None = None, seed: int = 0) -> MaskSet:
    """Images to segment.

    source: "scenes" (two to four objects with two colours of a shared palette, half as many scenes to test as to
    train; the classes are the background and the shapes), or a folder as this file's first lines say. size: side that
    images (bilinear) and masks (nearest) are resized to; scores are at this size. classes: how many a folder has;
    None is what classes.txt names, or else the highest label of any mask plus 1.
    Raises InputError for a folder without such pairs, a mask of another size than its image, and labels out of range.
    """
    if source == "scenes":
        if classes is not None:
            raise InputError(f"classes: {classes} was given, but scenes have {1 + len(SHAPES)}; leave it out")
        sets = _Scenes(train, size, seed, 0), _Scenes(max(1, train // 2), size, seed, train)
        return MaskSet("scenes", *sets, classes=("background", *SHAPES), size=size)
    return _folder(Path(source), size, classes)


def train_segmenter(
    data: MaskSet,
    *,
    backbone: str = "davit",
    backbone_config: Mapping[str, Any] | None = None,
    parameters: int = 150_000,
    model: Segmenter | None = None,
    steps: int = 400,
    batch: int = 16,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    out: str | Path | None = None,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedSegmenter:
    """Train one segmenter and test it. out: folder that the model is written to; None writes nothing.

    backbone_config: sizes of the backbone; None takes those of `sized_backbone`, of about so many parameters.
    model: one to go on with, such as `Segmenter.from_backbone` makes; the three are not looked at then. training:
    further `TrainingArguments`. progress: called with steps done, steps, and a word. AdamW, one cosine after 5 % of
    warm-up.
    Raises ValueError for an unknown backbone and for a model of other classes than the data's.
    """
    from transformers import set_seed

    set_seed(seed)
    if model is None:
        sizes = _sized(backbone, data, parameters) if backbone_config is None else backbone_config
        set_seed(seed)
        model = Segmenter(_config(backbone, dict(sizes), data))
    elif model.config.num_labels != len(data.classes):
        raise ValueError(
            f"train_segmenter: the model has {model.config.num_labels} classes, {data.name} has {len(data.classes)}"
        )
    scored = _Scores(len(data.classes), model.config.ignore_index)
    trainer = train_with(
        model,
        data.train,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        training={"per_device_eval_batch_size": 4 * batch, "batch_eval_metrics": True, **(training or {})},
        progress=progress,
        eval_dataset=data.test,
        compute_metrics=scored,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
    )
    loss = trainer.evaluate()["eval_loss"]
    scores = scored.last
    assert scores is not None  # the Trainer has tested
    iou = {name: value if value == value else None for name, value in zip(data.classes, scores.iou, strict=True)}
    return TrainedSegmenter(
        model=model.eval(),
        miou=scores.miou,
        pixel_accuracy=scores.pixel_accuracy,
        iou=iou,
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops(model, (torch.zeros(1, 3, data.size, data.size, device=model.device),)),
        loss=loss,
    )


def compare_backbones(
    data: MaskSet,
    backbones: Sequence[str],
    *,
    parameters: int = 150_000,
    seeds: Sequence[int] = (0, 1, 2),
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each backbone, each of about so many parameters: mean IoU and pixel accuracy of every seed.

    In a row stand means over seeds, `runs` with what each seed scored, and `spread`, the standard deviation of the mean
    IoU (None for one seed). options: of `train_segmenter`. log: called with a line for every network that is trained.
    """

    def train(name: str, sizes: dict[str, Any], seed: int) -> TrainedSegmenter:
        return train_segmenter(data, backbone=name, backbone_config=sizes, seed=seed, **options)

    def sizes(name: str) -> dict[str, Any]:
        return _sized(name, data, parameters)

    return compare_sized(backbones, seeds, sizes, train, ("miou", "pixel_accuracy"), log)


def _sized(backbone: str, data: MaskSet, parameters: int) -> dict[str, Any]:
    return sized_backbone(
        backbone,
        lambda sizes: Segmenter(_config(backbone, sizes, data)),
        size=data.size,
        parameters=parameters,
    )


def _config(backbone: str, sizes: dict[str, Any], data: MaskSet) -> SegmenterConfig:
    return SegmenterConfig(
        backbone,
        sizes,
        id2label=dict(enumerate(data.classes)),
        label2id={name: index for index, name in enumerate(data.classes)},
        ignore_index=IGNORE,
    )


class _Scores:
    """The Trainer's `compute_metrics`, batch by batch: adds up the table of pixels. last: scores of the last test."""

    def __init__(self, classes: int, ignore: int) -> None:
        self.classes, self.ignore = classes, ignore
        self.table: Tensor | int = 0
        self.last: ClassScores | None = None

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        true, predicted = (torch.as_tensor(x).cpu() for x in (prediction.label_ids, prediction.predictions))
        self.table = self.table + class_table(true, predicted, self.classes, ignore=self.ignore)
        if not compute_result:
            return {}
        self.last, self.table = class_scores(self.table), 0
        return {"miou": self.last.miou, "pixel_accuracy": self.last.pixel_accuracy}


# Folders


def _folder(root: Path, size: int, classes: int | None) -> MaskSet:
    if not root.is_dir():
        raise InputError(f"data: {root} is no folder; expected scenes, or a folder with images/ and masks/")
    test = next((root / name for name in SPLITS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test is not None:
        parts = _pairs(root / "train"), _pairs(test)
    else:
        every = _pairs(root)
        if len(every) < 2:
            raise InputError(f"data: {root} holds 1 image with a mask; expected two or more, one of them to test on")
        random.Random(0).shuffle(every)
        held = max(1, len(every) // HELD_OUT)
        parts = every[held:], every[:held]
    names = _class_names(root, classes, [mask for part in parts for _, mask in part])
    sets = (_Files(part, size, len(names)) for part in parts)
    return MaskSet(root.name, *sets, classes=names, size=size)


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    """Images with their masks. Their sizes are read, not their pixels."""
    images, masks = root / "images", root / "masks"
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"data: {root} has no folder {folder.name}; expected images/ and masks/")
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"data: {images} holds no pictures; expected {', '.join(PICTURES)}")
    pairs = []
    for image in found:
        mask = masks / f"{image.stem}.png"
        if not mask.is_file():
            raise InputError(f"data: {image} has no mask; expected {mask}")
        with opened(image) as one, opened(mask) as other:
            if one.size != other.size:
                raise InputError(
                    f"data: {mask} is {other.width} x {other.height} pixels, its image {one.width} x {one.height}; "
                    "they must be alike"
                )
            if other.mode not in ("1", "L", "P", "I", "I;16"):
                raise InputError(
                    f"data: {mask} has the colours {other.mode}; expected label numbers, grey or with a palette"
                )
        pairs.append((image, mask))
    return pairs


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        from PIL import Image
    except ImportError:
        raise InputError('data: pillow is not installed; pip install "headwise[vision]"') from None
    try:
        with Image.open(path) as picture:
            yield picture
    except OSError as error:
        raise InputError(f"data: {path} cannot be read as a picture ({error})") from error


def _class_names(root: Path, classes: int | None, masks: Sequence[Path]) -> tuple[str, ...]:
    """From classes.txt, or numbers; every mask is looked into where nothing else says how many there are."""
    listed = root / "classes.txt"
    if listed.is_file():
        names = tuple(line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(names) < 2 or len(set(names)) != len(names):
            raise InputError(f"data: {listed} names {len(names)} classes; expected two or more, each once")
        if classes is not None and classes != len(names):
            raise InputError(f"classes: {classes} was given, but {listed} names {len(names)}")
        return names
    if classes is None:
        classes = 1 + max((max(_labels(mask) - {IGNORE}, default=0) for mask in masks), default=0)
    if not 2 <= classes <= IGNORE:
        raise InputError(f"classes: {root} has {classes}; expected 2 to {IGNORE} labels counted from 0")
    return tuple(str(number) for number in range(classes))


def _labels(mask: Path) -> set[int]:
    import numpy

    with opened(mask) as picture:
        return set(numpy.unique(numpy.array(picture)).astype(int).tolist())


def _check_labels(mask: Path, labels: set[int], classes: int) -> None:
    if wrong := sorted(label for label in labels - {IGNORE} if not 0 <= label < classes):
        raise InputError(
            f"data: {mask} holds the label {wrong[0]}; there are {classes} classes, 0 to {classes - 1}, and {IGNORE} "
            "for pixels that do not count"
        )
