"""`headwise bench` and `headwise train`: speed, and specimens made again."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.common import (
    DEFAULT_OUT,
    Device,
    Dtype,
    Json,
    Output,
    Seed,
    device_of,
    document,
    dtype_of,
    output,
    quiet_libraries,
)
from headwise.errors import InputError

__all__ = ["bench", "train"]


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks; left out: all.")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="Only this input of a benchmark.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="How often each variant is timed.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process for each variant.")] = True,
    listing: Annotated[bool, typer.Option("--list", help="List the benchmarks.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory beside what one would use instead, as ratios of one run."""
    with output(as_json) as said:
        registry = _registry()
        known = registry.names()
        if listing:
            return said.write(document(benchmarks=known)) if as_json else print("\n".join(known))
        wanted = [name.replace("-", "_") for name in names or []]
        for given, name in zip(names or [], wanted, strict=True):
            if name not in known:
                from headwise.attend.addresses import nearest

                raise InputError(f"bench: {given!r} is unknown; there are {', '.join(known)}{nearest(name, known)}")
        quiet_libraries()
        found = registry.run(
            wanted or None,
            inputs=inputs,
            rounds=rounds,
            memory=memory,
            device=device_of(device),
            dtype=str(dtype_of(dtype or "float32")).removeprefix("torch."),
            log=said.log,
        )
        if as_json:
            return said.write(document(**found))
        print(f"{found['machine'].get('processor') or 'this machine'}; ratios to the first variant of each input\n")
        for row in found["rows"]:
            if row["skipped"]:
                figures = f"skipped: {row['skipped']}"
            else:
                peak = "" if row["peak_ratio"] is None else f"  memory {row['peak_ratio']:.2f}"
                figures = f"{row['median_ratio']:.2f} ± {row['spread']:.2f}{peak}"
            print(f"{row['name']:12} {row['input']:16} {row['variant']:34} {figures}")


def _registry() -> Any:
    """The folder `benchmarks` of the source tree that headwise is imported from."""
    from headwise.papers.recorded import checkout

    root = checkout()
    if root is None or not (root / "benchmarks" / "__init__.py").is_file():
        raise InputError(
            "bench: the benchmarks are not part of an installed package; run this in a checkout of headwise"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks")


def train(
    specimen: Annotated[
        str, typer.Argument(help="A specimen's name (see --list), image-classifier or vision-language-model.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help=f"Folder for the model ({DEFAULT_OUT}/SPECIMEN).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Fewer steps, for a trial.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="image-classifier: digits, scenes, a folder, or hub:NAME; the other: shapes, or JSON."
        ),
    ] = None,
    attention: Annotated[
        str | None, typer.Option("--attention", help="image-classifier: a class of headwise.attention.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="vision-language-model: a LLaVA, folder or hub id (the specimen).")
    ] = None,
    alignment: Annotated[
        str | None, typer.Option("--alignment", help="vision-language-model: saisa, naavit or embedding (saisa).")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a specimen again from nothing, or a model on your data by a recipe; write the model and its figures.

    image-classifier: on your pictures. vision-language-model: a LLaVA aligned anew, on shapes or a file as LLaVA's.
    """
    from headwise.commands import vision_language
    from headwise.specimens.registry import specimen_names

    with output(as_json) as said:
        if specimen == vision_language.NAME:
            if attention is not None:
                raise InputError(f"train: --attention is for image-classifier; {specimen} has no such option")
            return vision_language.train_aligned(said, data or "shapes", source, alignment or "saisa", out, steps, seed)
        if source is not None or alignment is not None:
            raise InputError(f"train: --from and --alignment are for {vision_language.NAME}; {specimen} has neither")
        if specimen == "image-classifier":
            return _train_classifier(said, data or "digits", attention, out, steps, seed, as_json)
        if data is not None or attention is not None:
            raise InputError(f"train: --data and --attention are for image-classifier; {specimen} has its own data")
        if specimen not in specimen_names():
            from headwise.attend.addresses import nearest

            known = [*specimen_names(), "image-classifier", vision_language.NAME]
            raise InputError(
                f"specimen: {specimen!r} is unknown; there are {', '.join(known)}{nearest(specimen, known)}"
            )
        folder = out if out is not None else Path(DEFAULT_OUT) / specimen
        from headwise._folders import writable_folder

        writable_folder(folder.parent)
        started = time.monotonic()
        made = _train(said, specimen, folder, seed, steps)
        _map_heads(said, made, specimen, seed)
        card = json.loads((made / "card.json").read_text(encoding="utf-8"))
        metrics = {key: value for key, value in card.items() if key in ("losses", "accuracies", "figures", "truth")}
        files = sorted(str(path) for path in made.rglob("*") if path.is_file())
        seconds = round(time.monotonic() - started, 1)
        if as_json:
            return said.write(document(specimen=specimen, seconds=seconds, metrics=metrics, files=files))
        print(f"{specimen}: {seconds:.0f} s, written to {made}")
        for name, values in metrics.items():
            print(f"  {name}: {json.dumps(values)}")
        print(f"use it: headwise scan {made}")


def _train_classifier(
    said: Output, source: str, attention: str | None, out: Path | None, steps: int | None, seed: int, as_json: bool
) -> None:
    """The recipe of `recipes.image_classification`, with its defaults."""
    from headwise._folders import writable_folder
    from headwise.recipes.image_classification import load_images, train_image_classifier

    folder = out if out is not None else Path(DEFAULT_OUT) / "image-classifier"
    writable_folder(folder)
    quiet_libraries()
    started = time.monotonic()
    images = load_images(source, seed=seed)
    said.log(f"training on {len(images.train)} images of {len(images.classes)} classes")
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    name = attention or "SoftmaxAttention"
    found = train_image_classifier(images, attention=name, out=folder, seed=seed, **options)
    figures = {"accuracy": found.accuracy, "parameters": found.parameters, "flops": found.flops, "loss": found.loss}
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        return said.write(
            document(data=images.name, attention=name, seconds=seconds, metrics=figures, folder=str(folder))
        )
    print(f"{name} on {images.name}: {found.accuracy:.1%} of {len(images.test)} test images right")
    print(f"{found.parameters:,} parameters, {found.flops:,} operations an image, {seconds:.0f} s, written to {folder}")


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
