"""What `headwise train` does for the recipes: options in, a model and figures out, or a table of several."""

import inspect
import json
import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from headwise.commands.common import Output, document
from headwise.errors import InputError

__all__ = ["run"]


def run(recipe: str, said: Output, given: Mapping[str, Any], folder: Path, steps: int | None, seed: int) -> None:
    """Run a recipe with the options that were given, by their names on the command line.

    The figures are printed, and the model or the table written into the folder, which is there.
    """
    one, several = _classifier, _compare_attention
    if recipe != "image-classifier":
        one, several = partial(_train_dense, recipe), partial(_compare_dense, recipe)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    if "--learning-rate" in given:
        options["learning_rate"] = given["--learning-rate"]
    started = time.monotonic()
    if "--compare" not in given:
        return one(said, given, folder, options, seed, started)
    if wrong := [name for name in ("--from", "--convert") if name in given]:
        raise InputError(f"train: {wrong[0]} is for one model; leave --compare out")
    seeds = list(range(seed, seed + given.get("--seeds", 3)))
    about = {"command": _command(recipe, given, steps, seed), "steps": steps or _default_steps(recipe), "seeds": seeds}
    several(said, given, folder, {**options, "seeds": seeds}, about, started)


def _command(recipe: str, given: Mapping[str, Any], steps: int | None, seed: int) -> str:
    """The command again, as it could be typed."""
    words = ["headwise", "train", recipe]
    for name, value in {**given, "--steps": steps, "--seed": seed or None}.items():
        if value is not None:
            words += [name] if value is True else [name, str(value)]
    return shlex.join(words)


def _default_steps(recipe: str) -> int:
    from headwise.recipes.image_classification import train_image_classifier

    function = train_image_classifier if recipe == "image-classifier" else _dense(recipe)[1]
    return inspect.signature(function).parameters["steps"].default


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


# image-classifier


def _classifier(
    said: Output, given: Mapping[str, Any], folder: Path, options: dict[str, Any], seed: int, started: float
) -> None:
    from headwise.recipes.image_classification import load_images, patch_size, train_image_classifier
    from headwise.recipes.mechanisms import mechanisms_for
    from headwise.recipes.pretrained import load_image_classifier, normalised

    source, start, attention = given.get("--data", "digits"), given.get("--from"), given.get("--attention")
    if start is None and "--convert" in given:
        raise InputError("train: --convert changes a trained model; say which by --from")
    if start is not None and attention is not None:
        raise InputError("train: --attention is for a model from nothing; with --from use --convert")
    if start is None:
        images = load_images(source, size=given.get("--size"), seed=seed)
        name = attention or "SoftmaxAttention"
        height, width = images.size[1:]
        patch = patch_size(height, width)
        options |= mechanisms_for((height // patch, width // patch)).get(name, {"attention": name})
    else:
        to, own = _conversion(given.get("--convert"))
        model: Any = load_image_classifier(start)
        side = getattr(model.config, "image_size", None)
        images = load_images(source, size=given.get("--size") or (side if isinstance(side, int) else None), seed=seed)
        model = load_image_classifier(start, classes=images.classes, to=to, **own)
        images = normalised(images, start)
        options["model"], name = model, to or start
    said.log(f"training on {len(images.train)} images of {len(images.classes)} classes")
    found = train_image_classifier(images, out=folder, seed=seed, **options)
    if start is not None:
        _copy_preprocessor(start, folder)
    figures = {"accuracy": found.accuracy, "parameters": found.parameters, "flops": found.flops, "loss": found.loss}
    seconds = round(time.monotonic() - started, 1)
    if said.as_json:
        return said.write(
            document(data=images.name, attention=name, seconds=seconds, metrics=figures, folder=str(folder))
        )
    print(f"{name} on {images.name}: {found.accuracy:.1%} of {len(images.test)} test images right")
    print(f"{found.parameters:,} parameters, {found.flops:,} operations an image, {seconds:.0f} s, written to {folder}")


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


def _copy_preprocessor(source: str, folder: Path) -> None:
    """What the images were normalised with belongs to the model."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return
    (folder / "preprocessor_config.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _compare_attention(
    said: Output, given: Mapping[str, Any], folder: Path, options: dict[str, Any], about: dict, started: float
) -> None:
    from headwise.recipes.image_classification import load_images
    from headwise.recipes.mechanisms import attention_table, table_text, write_table

    names = _names(given.get("--attention"))
    tables = {}
    for source in _names(given.get("--data", "digits")) or []:
        images = load_images(source, size=given.get("--size"))
        said.log(f"{images.name}: training on {len(images.train)} images of {len(images.classes)} classes")
        tables[images.name] = attention_table(images, names, log=said.log, **options)
    seconds = round(time.monotonic() - started, 1)
    about |= {"seconds": seconds, "versions": _versions()}
    files = write_table(folder, tables, about)
    if said.as_json:
        return said.write(document(**about, tables=tables, files=[str(path) for path in files]))
    for name, rows in tables.items():
        print(f"{name}\n\n{table_text(rows)}")
    print(f"{seconds:.0f} s, written to {folder}")


# segmentation, detection

WORDS = {"miou": "mean IoU", "pixel_accuracy": "pixels right", "ap": "AP", "ap50": "AP at 0.5", "ap75": "AP at 0.75"}


def _dense(recipe: str) -> tuple[Any, Any, Any, Any, tuple[str, ...], str]:
    """The recipe's functions to load, train and compare, its model, its scores, and its scores by class."""
    from headwise.models.detector import Detector
    from headwise.models.segmenter import Segmenter
    from headwise.recipes import detection, segmentation

    if recipe == "segmentation":
        functions = segmentation.load_masks, segmentation.train_segmenter, segmentation.compare_backbones
        return *functions, Segmenter, ("miou", "pixel_accuracy"), "iou"
    functions = detection.load_boxes, detection.train_detector, detection.compare_detectors
    return *functions, Detector, ("ap", "ap50", "ap75"), "by_class"


def _train_dense(
    recipe: str,
    said: Output,
    given: Mapping[str, Any],
    folder: Path,
    options: dict[str, Any],
    seed: int,
    started: float,
) -> None:
    load, train, _, model, scores, by_class = _dense(recipe)
    name, start = given.get("--backbone", "davit"), given.get("--from")
    if start is not None and "--parameters" in given:
        raise InputError("train: --parameters is for a backbone from nothing; leave it out with --from")
    _check_backbones([name])
    data = load(given.get("--data", "scenes"), seed=seed, **_data_options(given))
    if "--parameters" in given:
        options["parameters"] = given["--parameters"]
    if start is not None:
        options["model"] = _trained_backbone(model, name, start, data.classes)
        name = options["model"].config.backbone
    said.log(f"training on {len(data.train)} images of {len(data.classes)} classes")
    found = train(data, backbone=name, out=folder, seed=seed, **options)
    shown = (*scores, by_class, "parameters", "flops", "loss")
    figures = {score: getattr(found, score) for score in shown}
    seconds = round(time.monotonic() - started, 1)
    if said.as_json:
        return said.write(document(data=data.name, backbone=name, seconds=seconds, metrics=figures, folder=str(folder)))
    said_scores = ", ".join(f"{WORDS[score]} {figures[score]:.3f}" for score in scores)
    print(f"{name} on {data.name}: {said_scores} of {len(data.test)} test images")
    for label, value in figures[by_class].items():
        print(f"  {label}: {'-' if value is None else format(value, '.3f')}")
    print(f"{found.parameters:,} parameters, {found.flops:,} operations an image, {seconds:.0f} s, written to {folder}")


def _compare_dense(
    recipe: str,
    said: Output,
    given: Mapping[str, Any],
    folder: Path,
    options: dict[str, Any],
    about: dict[str, Any],
    started: float,
) -> None:
    from headwise.models.segmenter import BACKBONES

    load, _, compare, _, scores, _ = _dense(recipe)
    names = _names(given.get("--backbone")) or list(BACKBONES)
    _check_backbones(names)
    data = load(given.get("--data", "scenes"), **_data_options(given))
    if "--parameters" in given:
        options["parameters"] = given["--parameters"]
    said.log(f"training on {len(data.train)} images of {len(data.classes)} classes")
    rows = compare(data, names, log=said.log, **options)
    seconds = round(time.monotonic() - started, 1)
    about |= {"data": data.name, "classes": list(data.classes), "seconds": seconds, "versions": _versions()}
    path = folder / f"{recipe}-table.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if said.as_json:
        return said.write(document(**about, rows=rows, files=[str(path)]))
    heads = "  ".join(f"{WORDS[score]:>14}" for score in scores)
    print(f"{'backbone':14} {'parameters':>10} {'operations':>12}  {heads}")
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        first, *rest = (f"{row[score]:.3f}" for score in scores)
        values = "  ".join(f"{value:>14}" for value in (first + spread, *rest))
        print(f"{row['backbone']:14} {row['parameters']:>10,} {row['flops']:>12,}  {values}")
    print(f"{seconds:.0f} s, written to {path}")


def _data_options(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[f"--{name}"] for name in ("size", "classes") if f"--{name}" in given}


def _check_backbones(names: list[str]) -> None:
    from headwise.attend.addresses import nearest
    from headwise.models.segmenter import BACKBONES

    for name in names:
        if name not in BACKBONES:
            raise InputError(
                f"backbone: {name!r} is unknown; there are {', '.join(BACKBONES)}{nearest(name, BACKBONES)}"
            )


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
