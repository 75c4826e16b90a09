"""The recipes behind `headwise train`: networks that are trained on your own data, by transformers' Trainer."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.commands import image_recipes, vision_language
from headwise.commands.common import DEFAULT_OUT, Output, document, quiet_libraries
from headwise.errors import InputError

__all__ = ["RECIPES", "Recipe", "run_recipe"]

KINDS = ("csa", "se", "csa+se")


@dataclass(frozen=True)
class Request:
    """What was asked for: folder to write to, options that were given, and where to say how far it is."""

    folder: Path
    options: Mapping[str, Any]
    said: Output
    seed: int
    steps: int | None

    @property
    def training(self) -> dict[str, Any]:
        """What every recipe's training is given."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {"seed": self.seed, "progress": self.said.progress, **steps}

    def data(self, default: str) -> str:
        return self.options.get("data") or default

    def pairs(self, method: str, plain: str, train: Callable[[bool, Path], Any]) -> dict[str, Any]:
        """Train a method and, unless it is not wanted, the same network without it, which is written beside it."""
        found = {method: train(True, self.folder)}
        if self.options.get("baseline", True):
            found[plain] = train(False, self.folder / "baseline")
        return found


@dataclass(frozen=True)
class Recipe:
    """options: names of those that it takes. run: does it, and returns the document's fields and lines to print."""

    options: tuple[str, ...]
    run: Callable[[Request], tuple[dict[str, Any], list[str]]]


def run_recipe(
    said: Output,
    name: str,
    out: Path | None,
    steps: int | None,
    seed: int,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    """Run a recipe with the options that were given. Raises InputError for one that it does not take."""
    from headwise._folders import writable_folder

    recipe = RECIPES[name]
    if unknown := sorted(set(options) - set(recipe.options)):
        takes = ", ".join(f"--{option.replace('_', '-')}" for option in recipe.options)
        raise InputError(f"train: --{unknown[0].replace('_', '-')} is not an option of {name}, which takes {takes}")
    folder = writable_folder(out if out is not None else Path(DEFAULT_OUT) / name)
    quiet_libraries()
    started = time.monotonic()
    fields, lines = recipe.run(Request(folder, options, said, seed, steps))
    said.clear()
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        return said.write(document(**fields, seconds=seconds, folder=str(folder)))
    print("\n".join(lines))
    print(f"{seconds:.0f} s, written to {folder}")


def side_of(given: str | None) -> int | None:
    """A side in pixels. Raises InputError for anything else."""
    if given is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,3}", given):
        raise InputError(f"size: {given!r}; expected the side of a square in pixels, as 224")
    return int(given)


def _sides(given: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels of "HxW" or "N". Raises InputError for anything else."""
    if given is None:
        return None
    said = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", given)
    if said is None:
        raise InputError(f"size: {given!r}; expected height x width in pixels, as 256x128")
    return int(said[1]), int(said[2] or said[1])


def _table(rows: Mapping[str, Mapping[str, float]], columns: list[str]) -> list[str]:
    """Lines with a name and shares in per cent."""
    wide = max(len(name) for name in rows)
    head = " " * wide + "".join(f"{column:>{max(9, len(column) + 2)}}" for column in columns)
    lines = [head]
    for name, row in rows.items():
        cells = (f"{100 * row[column]:.1f} %" for column in columns)
        lines.append(
            name.ljust(wide) + "".join(f"{c:>{max(9, len(k) + 2)}}" for c, k in zip(cells, columns, strict=True))
        )
    return lines


def _fine_grained(asked: Request) -> tuple[dict[str, Any], list[str]]:
    from headwise.recipes.fine_grained import train_fine_grained
    from headwise.recipes.image_classification import load_images

    images = load_images(asked.data("digits"), size=side_of(asked.options.get("size")), train=200, seed=asked.seed)
    asked.said.log(f"training on {len(images.train)} images of {len(images.classes)} classes")
    backbone = asked.options.get("backbone")

    def train(dual: bool, folder: Path) -> Any:
        return train_fine_grained(images, dual=dual, backbone=backbone, out=folder, **asked.training)

    found = asked.pairs("DCAL", "baseline", train)
    metrics = {
        name: {"accuracy": one.accuracy, "alone": one.alone, "parameters": one.parameters}
        for name, one in found.items()
    }
    shown = {name: {"right": one.accuracy} for name, one in found.items()}
    shown["DCAL, self-attention alone"] = {"right": found["DCAL"].alone}
    lines = [f"{images.name}, {len(images.test)} test images", *_table(shown, ["right"])]
    return {"data": images.name, "metrics": metrics}, lines


def _reidentification(asked: Request) -> tuple[dict[str, Any], list[str]]:
    from headwise.recipes.reidentification import load_identities, train_reidentification

    data = load_identities(asked.data("people"), size=_sides(asked.options.get("size")), seed=asked.seed)
    asked.said.log(f"training on {len(data.train)} images of {data.people} identities")
    backbone = asked.options.get("backbone")

    def train(dual: bool, folder: Path) -> Any:
        return train_reidentification(data, dual=dual, backbone=backbone, out=folder, **asked.training)

    found = asked.pairs("DCAL", "baseline", train)
    metrics = {name: {**one.metrics, "alone": one.alone, "parameters": one.parameters} for name, one in found.items()}
    shown = {name: one.metrics for name, one in found.items()}
    shown["DCAL, self-attention alone"] = found["DCAL"].alone
    counted = int(found["DCAL"].metrics["queries"])
    lines = [
        f"{data.name}, {counted} queries in {len(data.gallery.images)} images by other cameras",
        *_table(shown, ["mAP", "rank-1", "rank-5", "rank-10"]),
    ]
    return {"data": data.name, "metrics": metrics}, lines


def _action_proposals(asked: Request) -> tuple[dict[str, Any], list[str]]:
    from headwise.recipes.action_proposals import train_action_proposals
    from headwise.recipes.proposal_videos import load_videos

    kind = asked.options.get("attention") or "csa"
    if kind not in KINDS:
        raise InputError(f"attention: {kind!r} is none of action-proposals; choose {', '.join(KINDS)}")
    data = load_videos(asked.data("generated"), window=asked.options.get("window"), seed=asked.seed)
    asked.said.log(f"training on {len(data.train)} videos or windows with {data.feature_dim} features a step")

    def train(attended: bool, folder: Path) -> Any:
        return train_action_proposals(data, attention=kind if attended else None, out=folder, **asked.training)

    method = f"BMN + {kind.upper()}"
    found = asked.pairs(method, "BMN", train)
    metrics = {name: {**one.metrics, "parameters": one.parameters} for name, one in found.items()}
    shown = {name: one.metrics for name, one in found.items()}
    lines = [
        f"{data.name}, {len(data.truth)} test videos" + ("" if data.scores else ", proposals whatever their class"),
        *_table(shown, list(found[method].metrics)),
    ]
    return {"data": data.name, "attention": kind, "metrics": metrics}, lines


TABLED = ("data", "size", "from", "learning_rate", "compare", "seeds")
RECIPES = {
    "image-classifier": Recipe((*TABLED, "attention", "convert"), image_recipes.classifier),
    "segmentation": Recipe((*TABLED, "backbone", "parameters", "classes"), image_recipes.segmentation),
    "detection": Recipe((*TABLED, "backbone", "parameters"), image_recipes.detection),
    "fine-grained": Recipe(("data", "backbone", "size", "baseline"), _fine_grained),
    "reidentification": Recipe(("data", "backbone", "size", "baseline"), _reidentification),
    "action-proposals": Recipe(("data", "attention", "window", "baseline"), _action_proposals),
    "vision-language-model": Recipe(("data", "from", "alignment"), vision_language.vision_language_model),
}
