"""Object detection with the backbone of your choice: generated scenes, or a folder of images with COCO annotations.

One `Detector` whose backbone is named, trained by transformers' Trainer, then measured on held-out images by average
precision. `compare_detectors` puts several backbones into one table, each of about as many parameters.

A folder holds `images/` and `annotations.json` as COCO writes it (images, annotations with bbox as x, y, width and
height in pixels, categories); `train/` and `test/` (or `val/`) may each hold such a pair. Crowds are left out.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headwise._files import read_json
from headwise.errors import InputError
from headwise.models.detector import Detector, DetectorConfig
from headwise.ops.counting import flops
from headwise.recipes._pictures import open_pixels
from headwise.recipes._trainer import Progress, train_with
from headwise.recipes.backbones import compare_sized, sized_backbone
from headwise.recipes.image_classification import HELD_OUT
from headwise.recipes.segmentation import SPLITS, opened
from headwise.tasks.detection import Boxes, DetectionScores, detection_scores
from headwise.tasks.scene_shapes import SHAPES
from headwise.tasks.scenes import object_scenes

__all__ = ["BoxSet", "TrainedDetector", "compare_detectors", "load_boxes", "train_detector"]

LEAST = 0.01  # scores below it are not looked at


class Boxed(Dataset):
    """Images, the classes of their boxes (-1 for a place without one) and the boxes by number, as the Trainer asks."""

    def __len__(self) -> int:
        raise NotImplementedError


class _Scenes(Boxed):
    def __init__(self, count: int, size: int, seed: int, start: int) -> None:
        made = object_scenes(count, size=size, seed=seed, start=start)
        self.images, self.boxes = made.image[:, 0], made.box[:, 0]
        self.labels = torch.where(made.present, made.shape, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index], "boxes": self.boxes[index]}


@dataclass(frozen=True)
class _Picture:
    path: Path
    labels: tuple[int, ...]
    boxes: tuple[tuple[float, float, float, float], ...]  # shares of the sides


class _Files(Boxed):
    def __init__(self, pictures: Sequence[_Picture], size: int) -> None:
        self.pictures, self.size = pictures, size
        self.places = max([1, *(len(one.labels) for one in pictures)])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        one = self.pictures[index]
        labels, boxes = torch.full((self.places,), -1), torch.zeros(self.places, 4)
        if one.labels:
            labels[: len(one.labels)], boxes[: len(one.labels)] = torch.tensor(one.labels), torch.tensor(one.boxes)
        return {"pixel_values": open_pixels(one.path, (self.size, self.size)), "labels": labels, "boxes": boxes}


@dataclass(frozen=True)
class BoxSet:
    """Images `[3 h w]` in [0, 1] with boxes `[m 4]` and their classes `[m]`. size: side in pixels."""

    name: str
    train: Boxed
    test: Boxed
    classes: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class TrainedDetector:
    """A trained network, its average precision on the test images, and what it costs.

    by_class: ap of each class by name; None for one that no test image has. flops: of one image, two for each
    multiply-accumulate, by counting.
    """

    model: Detector
    ap: float
    ap50: float
    ap75: float
    by_class: dict[str, float | None]
    parameters: int
    flops: int
    loss: float


def load_boxes(source: str, *, size: int = 48, train: int = 800, seed: int = 0) -> BoxSet:
    """Images with boxes.

    source: "scenes" (two to four objects, half as many scenes to test as to train; the classes are the shapes, the
    boxes what an object covers, seen or not), or a folder as this file's first lines say. size: side that images are
    resized to.
    Raises InputError for a folder without such files, and for boxes outside of their images.
    """
    if source == "scenes":
        sets = _Scenes(train, size, seed, 0), _Scenes(max(1, train // 2), size, seed, train)
        return BoxSet("scenes", *sets, classes=tuple(SHAPES), size=size)
    return _folder(Path(source), size)


def train_detector(
    data: BoxSet,
    *,
    backbone: str = "davit",
    backbone_config: Mapping[str, Any] | None = None,
    parameters: int = 150_000,
    model: Detector | None = None,
    steps: int = 400,
    batch: int = 16,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    out: str | Path | None = None,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedDetector:
    """Train one detector and test it; arguments as of `train_segmenter`.

    Raises ValueError for an unknown backbone and for a model of other classes than the data's.
    """
    from transformers import set_seed

    set_seed(seed)
    if model is None:
        sizes = _sized(backbone, data, parameters) if backbone_config is None else backbone_config
        set_seed(seed)
        model = Detector(_config(backbone, dict(sizes), data))
    elif model.config.num_labels != len(data.classes):
        raise ValueError(
            f"train_detector: the model has {model.config.num_labels} classes, {data.name} has {len(data.classes)}"
        )
    scored = _Scores(len(data.classes))
    own = {"per_device_eval_batch_size": 4 * batch, "batch_eval_metrics": True, "label_names": ["labels", "boxes"]}
    trainer = train_with(
        model,
        data.train,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        training={**own, **(training or {})},
        progress=progress,
        eval_dataset=data.test,
        compute_metrics=scored,
        preprocess_logits_for_metrics=lambda outputs, labels, model=model: model.found(*outputs[:2]),
    )
    loss = trainer.evaluate()["eval_loss"]
    scores = scored.last
    assert scores is not None  # the Trainer has tested
    by_class = zip(data.classes, scores.by_class, strict=True)
    return TrainedDetector(
        model=model.eval(),
        ap=scores.ap,
        ap50=scores.ap50,
        ap75=scores.ap75,
        by_class={name: value if value == value else None for name, value in by_class},
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops(model, (torch.zeros(1, 3, data.size, data.size, device=model.device),)),
        loss=loss,
    )


def compare_detectors(
    data: BoxSet,
    backbones: Sequence[str],
    *,
    parameters: int = 150_000,
    seeds: Sequence[int] = (0, 1, 2),
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each backbone, each of about so many parameters: AP, and AP at IoU 0.5 and 0.75.

    In a row stand means over seeds, `runs` with what each seed scored, and `spread`, the standard deviation of AP (None
    for one seed). options: of `train_detector`. log: called with a line for every network that is trained.
    """

    def train(name: str, sizes: dict[str, Any], seed: int) -> TrainedDetector:
        return train_detector(data, backbone=name, backbone_config=sizes, seed=seed, **options)

    def sizes(name: str) -> dict[str, Any]:
        return _sized(name, data, parameters)

    return compare_sized(backbones, seeds, sizes, train, ("ap", "ap50", "ap75"), log)


def _sized(backbone: str, data: BoxSet, parameters: int) -> dict[str, Any]:
    return sized_backbone(
        backbone,
        lambda sizes: Detector(_config(backbone, sizes, data)),
        size=data.size,
        parameters=parameters,
    )


def _config(backbone: str, sizes: dict[str, Any], data: BoxSet) -> DetectorConfig:
    names = {name: index for index, name in enumerate(data.classes)}
    return DetectorConfig(backbone, sizes, id2label=dict(enumerate(data.classes)), label2id=names)


class _Scores:
    """The Trainer's `compute_metrics`, batch by batch: keeps the boxes. last: scores of the last test."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.true: list[Boxes] = []
        self.predicted: list[Boxes] = []
        self.last: DetectionScores | None = None

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        labels, boxes = (torch.as_tensor(x).cpu() for x in prediction.label_ids)
        places, scores, kinds = (torch.as_tensor(x).cpu() for x in prediction.predictions)
        for row in range(len(labels)):
            real, seen = labels[row] >= 0, scores[row] >= LEAST
            self.true.append(Boxes(boxes[row][real], labels[row][real]))
            self.predicted.append(Boxes(places[row][seen].float(), kinds[row][seen], scores[row][seen].float()))
        if not compute_result:
            return {}
        self.last = detection_scores(self.true, self.predicted, self.classes)
        self.true, self.predicted = [], []
        return {"ap": self.last.ap, "ap50": self.last.ap50}


# Folders


def _folder(root: Path, size: int) -> BoxSet:
    if not root.is_dir():
        raise InputError(f"data: {root} is no folder; expected scenes, or a folder with images/ and annotations.json")
    test = next((root / name for name in SPLITS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test is not None:
        names, first = _annotated(root / "train")
        others, second = _annotated(test)
        if names != others:
            raise InputError(f"data: {test} has the categories {others}, {root / 'train'} has {names}")
        parts = first, second
    else:
        names, every = _annotated(root)
        if len(every) < 2:
            raise InputError(f"data: {root} lists {len(every)} images; expected two or more, one of them to test on")
        random.Random(0).shuffle(every)
        held = max(1, len(every) // HELD_OUT)
        parts = every[held:], every[:held]
    sets = (_Files(part, size) for part in parts)
    return BoxSet(root.name, *sets, classes=tuple(names), size=size)


def _annotated(root: Path) -> tuple[list[str], list[_Picture]]:
    """Names of the categories in the order of their ids, and the pictures with their boxes."""
    path = root / "annotations.json"
    if not path.is_file():
        raise InputError(f"data: {root} has no annotations.json")
    found = read_json(path)
    try:
        categories = sorted(found["categories"], key=lambda one: one["id"])
        number = {one["id"]: index for index, one in enumerate(categories)}
        names = [str(one["name"]) for one in categories]
        sides = {
            one["id"]: (str(one["file_name"]), float(one["width"]), float(one["height"])) for one in found["images"]
        }
        boxes: dict[Any, list[tuple[int, tuple[float, float, float, float]]]] = {key: [] for key in sides}
        for one in found["annotations"]:
            if one.get("iscrowd"):
                continue
            (_, wide, high), (x, y, w, h) = sides[one["image_id"]], one["bbox"]
            if w <= 0 or h <= 0 or x < -1 or y < -1 or x + w > wide + 1 or y + h > high + 1:
                raise InputError(
                    f"data: {path} has the box {one['bbox']} in an image of {wide:g} x {high:g} pixels; "
                    "expected x, y, width and height inside of it"
                )
            share = (x / wide, y / high, (x + w) / wide, (y + h) / high)
            boxes[one["image_id"]].append((number[one["category_id"]], share))
    except (KeyError, TypeError) as error:
        raise InputError(f"data: {path} is not as COCO writes it ({type(error).__name__}: {error})") from None
    if not names or not sides:
        raise InputError(f"data: {path} lists {len(names)} categories and {len(sides)} images; expected some of each")
    pictures = []
    for key, (file, wide, high) in sides.items():
        image = root / "images" / file
        if not image.is_file():
            raise InputError(f"data: {path} names {file}, which is not in {root / 'images'}")
        with opened(image) as picture:
            if picture.size != (wide, high):
                raise InputError(
                    f"data: {image} is {picture.width} x {picture.height} pixels, {path.name} says {wide:g} x {high:g}"
                )
        pictures.append(_Picture(image, tuple(k for k, _ in boxes[key]), tuple(box for _, box in boxes[key])))
    return names, pictures
