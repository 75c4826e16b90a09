"""Image classification with the attention of your choice: digits, scenes, a folder of pictures or a hub data set.

One `SmallViT` whose attention is a class of `headwise.attention`, trained by transformers' Trainer (so that
`accelerate launch`, mixed precision and logging are its own), then measured on held-out images. `compare_attention`
puts several mechanisms into one table, with what each costs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.errors import InputError
from headwise.models.small_vit import SmallViT, SmallViTConfig
from headwise.ops.counting import flops
from headwise.recipes._pictures import PICTURES, InMemory, Labelled, Pictures, open_pixels, patch_of, pixels
from headwise.recipes._trainer import Progress, train_with
from headwise.tasks.digits import digit_images
from headwise.tasks.scene_shapes import SHAPES
from headwise.tasks.scenes import object_scenes

__all__ = ["ImageSet", "TrainedClassifier", "compare_attention", "load_images", "train_image_classifier"]

HELD_OUT = 5  # one of so many files of a folder without a test part is kept for testing


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size `[c h w]` in [0, 1], for training and for testing."""

    name: str
    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    size: tuple[int, int, int]


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained network, the share of test images that it names right, and what it costs.

    flops: of one image, two for each multiply-accumulate, by counting.
    """

    model: PreTrainedModel
    accuracy: float
    parameters: int
    flops: int
    loss: float


def load_images(source: str, *, size: int | None = None, train: int = 1200, seed: int = 0) -> ImageSet:
    """Images to classify.

    source: "digits" (8 x 8, the split that the papers share; train is 200, 600 or 1200 images); "scenes" (one object on
    a gradient, the class is its shape; train of them, and half as many to test); "shapes" (the same of one colour on
    black, which is learned in a few hundred steps); a folder with a folder of pictures
    for each class, or with `train` and `test` (or `val`) holding such folders; or "hub:NAME", a data set with a column
    of images and one of labels (extra: data). size: side in pixels that pictures are resized to; 32 unless given.

    Raises InputError for a source that holds no labelled pictures.
    """
    if source == "digits":
        data = digit_images(train)
        sets = InMemory(data.images, data.labels), InMemory(data.test_images, data.test_labels)
        return ImageSet("digits", *sets, classes=tuple("0123456789"), size=(1, 8, 8))
    if source == "scenes":
        return _scenes("scenes", size or 32, train, seed)
    if source == "shapes":
        return _scenes("shapes", size or 32, train, seed, style="plain", background="black")
    if source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"), size or 32)
    return _folder(Path(source), size or 32)


def train_image_classifier(
    data: ImageSet,
    *,
    attention: str | Sequence[str] = "SoftmaxAttention",
    attention_options: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    out: str | Path | None = None,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> TrainedClassifier:
    """Train one classifier and test it. out: folder that the model is written to; None writes nothing.

    network: sizes of `SmallViTConfig` other than its defaults. training: further `TrainingArguments`, such as
    `bf16=True`; with more processes start the caller by `accelerate launch`. AdamW, one cosine after 5 % of warm-up.
    progress: called with steps done, steps, and a word.
    model: one to go on with, such as `recipes.load_image_classifier` gives; attention and network are not looked at
    then. Raises ValueError for a model of other images or classes than the data's.
    """
    from transformers import set_seed

    channels, height, width = data.size
    set_seed(seed)
    if model is not None:
        _check_model(model, data)
    else:
        model = SmallViT(
            SmallViTConfig(
                image_size=[height, width],
                num_channels=channels,
                id2label=dict(enumerate(data.classes)),
                label2id={name: index for index, name in enumerate(data.classes)},
                attention=attention,
                attention_options=attention_options,
                **{"patch_size": patch_of(height, width), **(network or {})},
            )
        )
    trainer = train_with(
        model,
        data.train,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        out=out,
        training=training,
        progress=progress,
        eval_dataset=data.test,
        compute_metrics=_accuracy,
    )
    figures = trainer.evaluate()
    return TrainedClassifier(
        model=model.eval(),
        accuracy=figures["eval_accuracy"],
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops(model, (torch.zeros(1, *data.size, device=model.device),)),
        loss=figures["eval_loss"],
    )


def compare_attention(
    data: ImageSet,
    mechanisms: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each mechanism: accuracy of every seed, their mean, parameters and operations for an image.

    mechanisms: classes of `headwise.attention` by name, or name in the table -> arguments of `train_image_classifier`
    (`attention`, `attention_options`, `network`). options: what all of them share.
    """
    table = mechanisms if isinstance(mechanisms, Mapping) else {name: {"attention": name} for name in mechanisms}
    rows = []
    for name, own in table.items():
        runs = [train_image_classifier(data, seed=seed, **{**options, **own}) for seed in seeds]
        accuracies = [run.accuracy for run in runs]
        rows.append(
            {
                "mechanism": name,
                "accuracy": sum(accuracies) / len(accuracies),
                "accuracies": accuracies,
                "parameters": runs[0].parameters,
                "flops": runs[0].flops,
            }
        )
    return rows


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _check_model(model: PreTrainedModel, data: ImageSet) -> None:
    config: Any = model.config
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", data.size[0])
    wanted = data.size[1:] if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if (channels, *wanted) != data.size:
        raise ValueError(
            f"train_image_classifier: the model takes images of {channels} x {wanted[0]} x {wanted[1]}, {data.name} "
            f"has {' x '.join(map(str, data.size))}"
        )
    if config.num_labels != len(data.classes):
        raise ValueError(
            f"train_image_classifier: the model has {config.num_labels} classes, {data.name} has {len(data.classes)}"
        )


def _scenes(name: str, size: int, train: int, seed: int, **style: Any) -> ImageSet:
    scale = (0.25, 0.4) if style else (0.2, 0.35)

    def part(count: int, start: int) -> InMemory:
        made = object_scenes(
            count, size=size, min_objects=1, max_objects=1, scale=scale, seed=seed, start=start, **style
        )
        return InMemory(made.image[:, 0], made.shape[:, 0])

    sets = part(train, 0), part(max(1, train // 2), train)
    return ImageSet(name, *sets, classes=tuple(SHAPES), size=(3, size, size))


def _folder(root: Path, size: int) -> ImageSet:
    if not root.is_dir():
        raise InputError(
            f"data: {root} is no folder; expected digits, scenes, shapes, a folder of pictures, or hub:NAME"
        )

    def labelled(part: Path) -> dict[str, list[Path]]:
        return {
            folder.name: found
            for folder in sorted(part.iterdir())
            if folder.is_dir() and (found := sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES))
        }

    def open_picture(path: Path) -> Tensor:
        return open_pixels(path, (size, size))

    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    parts = (labelled(root / "train"), labelled(test)) if test is not None and (root / "train").is_dir() else None
    if parts is None:
        every = labelled(root)
        parts = (
            {name: [p for i, p in enumerate(files) if i % HELD_OUT] for name, files in every.items()},
            {name: files[::HELD_OUT] for name, files in every.items()},
        )
    classes = tuple(sorted(parts[0]))
    if len(classes) < 2 or not all(parts[0].values()):
        raise InputError(
            f"data: {root} holds {len(classes)} folders of pictures; expected two or more classes, two pictures each"
        )
    if unknown := sorted(set(parts[1]) - set(classes)):
        raise InputError(f"data: {root} tests the class {unknown[0]!r}, of which it has no training pictures")
    sets = (
        Pictures([(path, classes.index(name)) for name in part for path in part[name]], open_picture) for part in parts
    )
    return ImageSet(root.name, *sets, classes=classes, size=(3, size, size))


def _hub(name: str, size: int) -> ImageSet:
    from datasets import ClassLabel, Image, load_dataset  # pyright: ignore[reportMissingImports]

    loaded: Any = load_dataset(name)
    first = loaded.get("train")
    other = next((loaded[part] for part in ("test", "validation", "valid") if part in loaded), None)
    if first is None:
        raise InputError(f"data: hub:{name} has the parts {', '.join(loaded)}; expected one called train")
    if other is None:
        halves = first.train_test_split(test_size=1 / HELD_OUT, seed=0)
        first, other = halves["train"], halves["test"]
    kinds = {column: type(feature) for column, feature in first.features.items()}
    image = next((column for column, kind in kinds.items() if kind is Image), None)
    label = next((column for column, kind in kinds.items() if kind is ClassLabel), None)
    if image is None or label is None:
        raise InputError(
            f"data: hub:{name} has the columns {', '.join(first.features)}; expected one of images and one of classes"
        )

    class Rows(Labelled):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = self.rows[int(index)]
            return {"pixel_values": pixels(row[image], (size, size)), "labels": torch.tensor(row[label])}

    return ImageSet(name, Rows(first), Rows(other), classes=tuple(first.features[label].names), size=(3, size, size))
