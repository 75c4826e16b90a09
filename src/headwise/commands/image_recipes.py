"""The recipes behind `headwise train` for images: classes of images, classes of pixels and boxes, alone or compared."""

import inspect
import json
import shlex
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from headwise.commands.common import document
from headwise.errors import InputError

__all__ = ["classifier", "detection", "segmentation"]

Answer = tuple[dict[str, Any], list[str]]
WORDS = {"miou": "mean IoU", "pixel_accuracy": "pixels right", "ap": "AP", "ap50": "AP at 0.5", "ap75": "AP at 0.75"}


def classifier(asked: Any) -> Answer:
    """A small vision transformer from nothing, a trained classifier to go on with, or a table of mechanisms."""
    if asked.options.get("compare"):
        return _compare_attention(asked)
    _alone(asked)
    from headwise.recipes._pictures import patch_of
    from headwise.recipes.image_classification import load_images, train_image_classifier
    from headwise.recipes.mechanisms import mechanisms_for
    from headwise.recipes.pretrained import load_image_classifier, normalised

    given, own = asked.options, {}
    source, start, attention = asked.data("digits"), given.get("from"), given.get("attention")
    if start is None and "convert" in given:
        raise InputError("train: --convert changes a trained model; say which by --from")
    if start is not None and attention is not None:
        raise InputError("train: --attention is for a model from nothing; with --from use --convert")
    if start is None:
        images = load_images(source, size=_side(given), seed=asked.seed)
        name = attention or "SoftmaxAttention"
        height, width = images.size[1:]
        patch = patch_of(height, width)
        own = mechanisms_for((height // patch, width // patch)).get(name, {"attention": name})
    else:
        to, options = _conversion(given.get("convert"))
        side = getattr(load_image_classifier(start).config, "image_size", None)
        images = load_images(source, size=_side(given) or (side if isinstance(side, int) else None), seed=asked.seed)
        own = {"model": load_image_classifier(start, classes=images.classes, to=to, **options)}
        images, name = normalised(images, start), to or start
    asked.said.log(f"training on {len(images.train)} images of {len(images.classes)} classes")
    found = train_image_classifier(images, out=asked.folder, **own, **_training(asked))
    if start is None:
        _write_preprocessor(*images.size[1:], asked)
    else:
        _copy_preprocessor(start, asked)
    figures = {"accuracy": found.accuracy, "parameters": found.parameters, "flops": found.flops, "loss": found.loss}
    lines = [
        f"{name} on {images.name}: {found.accuracy:.1%} of {len(images.test)} test images right",
        f"{found.parameters:,} parameters, {found.flops:,} operations an image",
    ]
    return {"data": images.name, "attention": name, "metrics": figures}, lines


def _compare_attention(asked: Any) -> Answer:
    from headwise.recipes.image_classification import load_images, train_image_classifier
    from headwise.recipes.mechanisms import attention_table, table_text, write_table

    seeds, about, started = *_several("image-classifier", asked, train_image_classifier), time.monotonic()
    names, tables = _names(asked.options.get("attention")), {}
    files: list[Any] = []

    def keep(source: str, rows: list[dict[str, Any]]) -> None:
        """Written again with every row, so that a long comparison that is broken off is not lost."""
        tables[source] = rows
        files[:] = write_table(asked.folder, tables, {**about, "seconds": round(time.monotonic() - started, 1)})

    for source in _names(asked.data("digits")) or []:
        images = load_images(source, size=_side(asked.options))
        asked.said.log(f"{images.name}: training on {len(images.train)} images of {len(images.classes)} classes")
        options = {key: value for key, value in _training(asked).items() if key != "seed"}
        own = partial(keep, images.name)
        attention_table(images, names, seeds=seeds, log=asked.said.log, keep=own, **options)
    lines = [f"{name}\n\n{table_text(rows)}" for name, rows in tables.items()]
    return {**about, "tables": tables, "files": [str(path) for path in files]}, lines


def _dense(recipe: str, asked: Any) -> Answer:
    """A segmenter or a detector on a backbone, or a table of several backbones."""
    from headwise.models.detector import Detector
    from headwise.models.segmenter import Segmenter
    from headwise.recipes import detection, segmentation

    given = asked.options
    if recipe == "segmentation":
        load, train, compare = segmentation.load_masks, segmentation.train_segmenter, segmentation.compare_backbones
        kind, scores, by_class = Segmenter, ("miou", "pixel_accuracy"), "iou"
    else:
        load, train, compare = detection.load_boxes, detection.train_detector, detection.compare_detectors
        kind, scores, by_class = Detector, ("ap", "ap50", "ap75"), "by_class"
    if not given.get("compare"):
        _alone(asked)
    names = _backbones(given.get("backbone"), bool(given.get("compare")))
    sides = {"size": _side(given), "classes": given.get("classes")}
    data: Any = load(asked.data("scenes"), seed=asked.seed, **{k: v for k, v in sides.items() if v is not None})
    own: dict[str, Any] = {"parameters": given["parameters"]} if "parameters" in given else {}
    words = f"training on {len(data.train)} images of {len(data.classes)} classes"
    if given.get("compare"):
        asked.said.log(words)
        return _compare_dense(recipe, asked, data, names, own, train, compare, scores)
    if "from" in given:
        if own:
            raise InputError("train: --parameters is for a backbone from nothing; leave it out with --from")
        own = {"model": _trained_backbone(kind, names[0], given["from"], data.classes)}
        names = [own["model"].config.backbone]
    asked.said.log(words)
    found: Any = train(data, backbone=names[0], out=asked.folder, **own, **_training(asked))
    _write_preprocessor(data.size, data.size, asked)
    figures = {score: getattr(found, score) for score in (*scores, by_class, "parameters", "flops", "loss")}
    shown = ", ".join(f"{WORDS[score]} {figures[score]:.3f}" for score in scores)
    lines = [f"{names[0]} on {data.name}: {shown} of {len(data.test)} test images"]
    lines += [f"  {label}: {'-' if value is None else f'{value:.3f}'}" for label, value in figures[by_class].items()]
    lines.append(f"{found.parameters:,} parameters, {found.flops:,} operations an image")
    return {"data": data.name, "backbone": names[0], "metrics": figures}, lines


segmentation = partial(_dense, "segmentation")
detection = partial(_dense, "detection")


def _compare_dense(
    recipe: str, asked: Any, data: Any, names: list[str], own: dict, train: Any, compare: Any, scores: tuple[str, ...]
) -> Answer:
    seeds, about, started = *_several(recipe, asked, train), time.monotonic()
    options = {key: value for key, value in _training(asked).items() if key != "seed"}
    rows = compare(data, names, seeds=seeds, log=asked.said.log, **own, **options)
    about |= {"seconds": round(time.monotonic() - started, 1), "data": data.name, "classes": list(data.classes)}
    path = asked.folder / f"{recipe}-table.json"
    path.write_text(json.dumps(document(**about, rows=rows), indent=1) + "\n", encoding="utf-8")
    heads = "  ".join(f"{WORDS[score]:>14}" for score in scores)
    lines = [f"{'backbone':14} {'parameters':>10} {'operations':>12}  {heads}"]
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        first, *rest = (f"{row[score]:.3f}" for score in scores)
        values = "  ".join(f"{value:>14}" for value in (first + spread, *rest))
        lines.append(f"{row['backbone']:14} {row['parameters']:>10,} {row['flops']:>12,}  {values}")
    del about["seconds"]  # the command counts them for itself
    return {**about, "rows": rows, "files": [str(path)]}, lines


# What was asked for


def _training(asked: Any) -> dict[str, Any]:
    rate = asked.options.get("learning_rate")
    return {**asked.training, **({} if rate is None else {"learning_rate": rate})}


def _alone(asked: Any) -> None:
    if "seeds" in asked.options:
        raise InputError("train: --seeds is for --compare; one model is trained with --seed")


def _several(recipe: str, asked: Any, train: Any) -> tuple[list[int], dict[str, Any]]:
    """The seeds of a comparison, and what its document says of how it was made: the command as it could be typed."""
    import torch
    import transformers

    if wrong := [name for name in ("from", "convert") if name in asked.options]:
        raise InputError(f"train: --{wrong[0]} is for one model; leave --compare out")
    words = ["headwise", "train", recipe]
    for name, value in {**asked.options, "steps": asked.steps, "seed": asked.seed or None}.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    seeds = list(range(asked.seed, asked.seed + asked.options.get("seeds", 3)))
    steps = asked.steps or inspect.signature(train).parameters["steps"].default
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return seeds, {"command": shlex.join(words), "steps": steps, "seeds": seeds, "versions": versions}


def _side(given: Mapping[str, Any]) -> int | None:
    from headwise.commands.recipes import side_of

    return side_of(given.get("size"))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _backbones(text: str | None, several: bool) -> list[str]:
    from headwise.attend.addresses import nearest
    from headwise.models.segmenter import BACKBONES

    names = (_names(text) if several else None if text is None else [text]) or (
        list(BACKBONES) if several else ["davit"]
    )
    for name in names:
        if name not in BACKBONES:
            raise InputError(
                f"backbone: {name!r} is unknown; there are {', '.join(BACKBONES)}{nearest(name, BACKBONES)}"
            )
    return names


def _conversion(text: str | None) -> tuple[str | None, dict[str, Any]]:
    """ "NAME:key=value,..." as a name and options; values are JSON where they can be."""
    if text is None:
        return None, {}
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise InputError(f"convert: {part!r} in {text!r} cannot be read; write NAME:key=value,key=value")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value.strip()
    return name, options


def _write_preprocessor(height: int, width: int, asked: Any) -> None:
    """How a picture file becomes what the model was trained on: resized, in [0, 1]."""
    rules = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
    _preprocessor(rules, asked)


def _preprocessor(rules: dict[str, Any], asked: Any) -> None:
    path = asked.folder / "preprocessor_config.json"
    path.write_text(json.dumps(rules, indent=2) + "\n", encoding="utf-8")


def _copy_preprocessor(source: str, asked: Any) -> None:
    """What the images were normalised with belongs to the model."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return
    _preprocessor(found, asked)


def _trained_backbone(model: Any, name: str, source: str, classes: tuple[str, ...]) -> Any:
    """A model to go on with, or a new one on a trained backbone."""
    from transformers import PreTrainedConfig

    try:
        found = PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        raise InputError(f"from: {source} is no model ({error}); give a folder with config.json, or a hub id") from None
    if found.get("model_type") == model.config_class.model_type:
        return model.from_pretrained(source)
    return model.from_backbone(name, source, id2label=dict(enumerate(classes)))
