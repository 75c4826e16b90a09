"""`headwise train`: specimens made again, and recipes for your own images."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.common import DEFAULT_OUT, Json, Output, Seed, document, output, quiet_libraries
from headwise.errors import InputError

__all__ = ["train"]

# Which options a recipe takes; a specimen has its own data and takes none of them.
SHARED = {"--data", "--size", "--from", "--learning-rate", "--compare", "--seeds"}
RECIPES = {
    "image-classifier": SHARED | {"--attention", "--convert"},
    "segmentation": SHARED | {"--backbone", "--parameters", "--classes"},
    "detection": SHARED | {"--backbone", "--parameters"},
}


def train(
    specimen: Annotated[
        str,
        typer.Argument(help="A specimen's name (see --list), or a recipe: image-classifier, segmentation, detection."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help=f"Folder for the model ({DEFAULT_OUT}/SPECIMEN).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Fewer steps, for a trial.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="digits, scenes, shapes, a folder or hub:NAME; segmentation, detection: scenes, a folder."
        ),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Side in pixels that pictures are made to.")] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="image-classifier: a class of headwise.attention (SoftmaxAttention)."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="The others: davit, neighborhood, agent, small-vit, ... (davit).")
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option("--parameters", min=1, help="With --backbone: about so many; its width follows (150000)."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="segmentation: labels of a folder's masks, from 0.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Go on with this model, a folder or a hub id; with --backbone: its weights."),
    ] = None,
    converted: Annotated[
        str | None,
        typer.Option("--convert", help="image-classifier: first convert it, NAME[:key=value,...] as mixture-of-head."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="One table of several --attention or --backbone A,B,...; left out: of all."),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="With --compare: how many, from --seed on (3).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", min=0.0, help="Of a recipe; the highest of its cosine (0.002).")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a specimen again from nothing, or a model on your pictures by a recipe; write it and its figures.

    image-classifier: a small vision transformer with the attention of your choice, or a model to go on with.
    segmentation: classes of pixels, and detection: boxes, on a backbone of your choice.
    """
    from headwise.specimens.registry import specimen_names

    given: dict[str, Any] = {
        "--data": data, "--size": size, "--attention": attention, "--backbone": backbone, "--parameters": parameters,
        "--classes": classes, "--from": source, "--convert": converted, "--compare": compare or None, "--seeds": seeds,
        "--learning-rate": learning_rate,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with output(as_json) as said:
        if specimen not in RECIPES and specimen not in specimen_names():
            from headwise.attend.addresses import nearest

            known = [*specimen_names(), *RECIPES]
            raise InputError(
                f"specimen: {specimen!r} is unknown; there are {', '.join(known)}{nearest(specimen, known)}"
            )
        if wrong := [name for name in given if name not in RECIPES.get(specimen, ())]:
            takers = [name for name, options in RECIPES.items() if wrong[0] in options]
            own = "has no such option" if specimen in RECIPES else "has its own data"
            raise InputError(f"train: {wrong[0]} is for {' and '.join(takers)}; {specimen} {own}")
        if seeds is not None and not compare:
            raise InputError("train: --seeds is for --compare; one model is trained with --seed")
        if specimen not in RECIPES:
            return _train_specimen(said, specimen, out, steps, seed)
        from headwise._folders import writable_folder
        from headwise.commands import recipes

        folder = out if out is not None else Path(DEFAULT_OUT) / specimen
        writable_folder(folder)
        quiet_libraries()
        recipes.run(specimen, said, given, folder, steps, seed)


def _train_specimen(said: Output, specimen: str, out: Path | None, steps: int | None, seed: int) -> None:
    from headwise._folders import writable_folder

    folder = out if out is not None else Path(DEFAULT_OUT) / specimen
    writable_folder(folder.parent)
    started = time.monotonic()
    made = _train(said, specimen, folder, seed, steps)
    _map_heads(said, made, specimen, seed)
    card = json.loads((made / "card.json").read_text(encoding="utf-8"))
    metrics = {key: value for key, value in card.items() if key in ("losses", "accuracies", "figures", "truth")}
    files = sorted(str(path) for path in made.rglob("*") if path.is_file())
    seconds = round(time.monotonic() - started, 1)
    if said.as_json:
        return said.write(document(specimen=specimen, seconds=seconds, metrics=metrics, files=files))
    print(f"{specimen}: {seconds:.0f} s, written to {made}")
    for name, values in metrics.items():
        print(f"  {name}: {json.dumps(values)}")
    print(f"use it: headwise scan {made}")


def _map_heads(said: Output, folder: Path, name: str, seed: int) -> None:
    """Scan what was trained and write its head map beside it, so that selections by score need no scan of their own."""
    from headwise.api import scan

    said.progress(0, 1, "scanning")
    found = scan(folder, probes="all", seed=seed, progress=said.progress)
    found.model = name
    said.clear()
    found.save(folder / "heads.json")


def _train(said: Output, specimen: str, folder: Path, seed: int, steps: int | None) -> Path:
    from headwise import api

    quiet_libraries()
    options = {} if steps is None else {"steps": steps}

    def log(record: dict[str, Any]) -> None:
        said.log("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))

    try:
        return api.train(specimen, folder, seed=seed, log=log, **options)
    except TypeError as error:
        if steps is not None and "steps" in str(error):
            raise InputError(f"train: {specimen} is written by hand and takes no --steps; leave it out") from None
        raise
