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
    inputs: Annotated[list[str] | None, typer.Option("--input", help="Only inputs whose name has this in it.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="How often each variant is timed.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process for each variant.")] = True,
    listing: Annotated[bool, typer.Option("--list", help="List the benchmarks, or the inputs of those named.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory beside what one would use instead, as ratios of one run."""
    with output(as_json) as said:
        registry = _registry()
        known = registry.names()
        if listing and not names:
            return said.write(document(benchmarks=known)) if as_json else print("\n".join(known))
        wanted = [name.replace("-", "_") for name in names or []]
        for given, name in zip(names or [], wanted, strict=True):
            if name not in known:
                from headwise.attend.addresses import nearest

                raise InputError(f"bench: {given!r} is unknown; there are {', '.join(known)}{nearest(name, known)}")
        quiet_libraries()
        if listing:
            labels = {name: list(registry.load(name).inputs) for name in wanted}
            if as_json:
                return said.write(document(inputs=labels))
            print("\n".join(label for inputs_of in labels.values() for label in inputs_of))
            return None
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
        digests = found.get("digests", {})
        for row in found["rows"]:
            if row["name"] in digests:
                continue
            if row["skipped"]:
                figures = f"skipped: {row['skipped']}"
            else:
                peak = "" if row["peak_ratio"] is None else f"  memory {row['peak_ratio']:.2f}"
                figures = f"{row['median_ratio']:.2f} ± {row['spread']:.2f}{peak}"
            print(f"{row['name']:12} {row['input']:16} {row['variant']:34} {figures}")
        for lines in digests.values():
            _print_digest(lines)


def _print_digest(lines: list[dict[str, Any]]) -> None:
    """One table for each part and pass; each figure is headwise's time, or its memory, over what the column names."""

    def figure(value: float | None, unit: str = "") -> str:
        return "-" if value is None else f"{value:.3g}{unit}"

    last = None
    for line in lines:
        if (line["part"], line["pass"]) != last:
            last = line["part"], line["pass"]
            ahead = f"; ahead of softmax attention {line['break_even']}" if line["break_even"] else ""
            print(f"\n{line['part']}, {line['pass']}{ahead}")
            print(f"  {'':30} {'/ softmax':>10} {'/ product':>10} {'/ peer':>8}   MiB: own, softmax, peer")
        memory = ", ".join(figure(line[key]) for key in ("mib", "softmax_mib", "peer_mib"))
        peer = f"  ({line['peer']})" if line["peer"] else ""
        figures = f"{figure(line['of_softmax']):>10} {figure(line['of_product']):>10} {figure(line['of_peer']):>8}"
        print(f"  {line['size']:30} {figures}   {memory}{peer}")


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
        str,
        typer.Argument(
            help="A specimen's name, or a recipe: image-classifier, segmentation, detection, fine-grained, "
            "reidentification, action-proposals, vision-language-model."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help=f"Folder for the model ({DEFAULT_OUT}/SPECIMEN).")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Fewer steps, for a trial.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Recipes: a folder, or what is drawn: digits, scenes, shapes (hub:NAME, too), people, generated, or "
            "conversations as LLaVA's JSON.",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            help="image-classifier: a class of headwise.attention ; action-proposals: csa, se or csa+se.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            help="segmentation, detection: davit, neighborhood, agent, small-vit, ...; others: a ViT (hub id, folder).",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Pictures are resized to it: 224, or 256x128 for reidentification.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=2, help="action-proposals: rows of features seen at once; else all.")
    ] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Recipes with a method: train the network without it, too."),
    ] = None,
    parameters: Annotated[
        int | None, typer.Option("--parameters", min=1, help="segmentation, detection: about so many (150000).")
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="segmentation: labels of a folder's masks, from 0.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Go on with this model or, with --backbone, its weights; folder, hub id."),
    ] = None,
    convert: Annotated[
        str | None,
        typer.Option("--convert", help="image-classifier: first convert it: mixture-of-head[:key=value,...], ..."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One table of several --attention or --backbone A,B,...; else of all.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="With --compare: how many, from --seed on (3).")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", min=0.0, help="The highest of the cosine (0.002).")
    ] = None,
    alignment: Annotated[
        str | None, typer.Option("--alignment", help="vision-language-model: saisa, naavit or embedding (saisa).")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a specimen again from nothing, or a recipe's network on your data; write the model and its figures."""
    from headwise.commands.recipes import RECIPES, run_recipe
    from headwise.specimens.registry import specimen_names

    given: dict[str, Any] = {
        "data": data,
        "attention": attention,
        "backbone": backbone,
        "size": size,
        "window": window,
        "baseline": baseline,
        "parameters": parameters,
        "classes": classes,
        "from": source,
        "convert": convert,
        "compare": compare or None,
        "seeds": seeds,
        "learning_rate": learning_rate,
        "alignment": alignment,
    }
    options = {name: value for name, value in given.items() if value is not None}
    with output(as_json) as said:
        if specimen in RECIPES:
            return run_recipe(said, specimen, out, steps, seed, as_json, options)
        if specimen not in specimen_names():
            from headwise.attend.addresses import nearest

            known = [*specimen_names(), *RECIPES]
            raise InputError(
                f"specimen: {specimen!r} is unknown; there are {', '.join(known)}{nearest(specimen, known)}"
            )
        if options:
            first = next(iter(options)).replace("_", "-")
            raise InputError(f"train: --{first} is for {', '.join(RECIPES)}; {specimen} has its own data")
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
