"""`headwise scan`: what the heads of a model do on a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands import inventory
from headwise.commands.common import (
    DEFAULT_OUT,
    Device,
    Dtype,
    Json,
    Output,
    Seed,
    device_of,
    dtype_of,
    output,
    quiet_libraries,
)
from headwise.errors import InputError

__all__ = ["scan"]


def scan(
    model: Annotated[str, typer.Argument(help="A hub id, a local folder, or a specimen's name (see --list).")] = "text",
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", help="Which probes: names joined by commas, all, or module:Class; give it repeatedly."),
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="A text file or JSONL; left out: a shipped page.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help=f"Folder for the head map and the report ({DEFAULT_OUT}/MODEL).")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="Another model, or a heads.json: show what differs.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="A folder of pictures, for vision models.")] = None,
    rows: Annotated[str, typer.Option("--rows", help="all: every row also of windows above 2,048 tokens.")] = "auto",
    window: Annotated[int, typer.Option("--window", help="Longest piece of text read at once, in tokens.")] = 1024,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="Tokens of one forward.")] = 4096,
    listing: Annotated[bool, typer.Option("--list", help="List probes, edits, key groups and specimens.")] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Score every head of MODEL under every probe; print the strongest, write a head map and a report."""
    with output(as_json) as said:
        if listing:
            return inventory.show(said)
        run(said, model, probe, text, out, compare, images, rows, window, batch_tokens, seed, device, dtype)


def run(
    said: Output,
    model: str,
    probe: list[str] | None,
    text: Path | None,
    out: Path | None,
    compare: str | None,
    images: Path | None,
    rows: str,
    window: int,
    batch_tokens: int,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> None:
    if rows not in ("auto", "all"):
        raise InputError(f"rows: {rows!r} is unknown; choose auto or all")
    folder = _folder(out, model, said.as_json)
    from headwise import _scan, api
    from headwise._texts import read_text

    quiet_libraries()
    probes = named_probes(probe)
    words = None if text is None else read_text(text)  # refused before a model is loaded
    other = _other_map(compare)
    options: dict[str, Any] = {
        "probes": probes, "text": words, "images": images, "rows": rows, "window": window,
        "batch_tokens": batch_tokens, "seed": seed, "device": device_of(device), "dtype": dtype_of(dtype),
        "progress": said.progress,
    }  # fmt: skip
    said.progress(0, 1, f"loading {model}")
    found = api.scan(model, **options)
    comparison = None
    if compare is not None:
        options["probes"] = named_probes(probe)  # probes keep what they have read: fresh ones for another model
        comparison = _scan.compare(found, other if other is not None else api.scan(compare, **options))
        comparison["name"] = comparison["name"] if other is None or other.model else Path(compare).name
    said.clear()
    files = found.write(folder, comparison=comparison) if folder is not None else {}
    if said.as_json:
        extra = {"comparison": comparison} if comparison else {}
        said.write(found.to_json() | extra | {"files": [str(path) for path in files.values()]})
        return
    _print(found, comparison, files)


def named_probes(names: list[str] | None) -> Any:
    """Probe names, and the classes that module:Class names."""
    if not names:
        return None
    from headwise._edits import import_name
    from headwise._scan import resolve_probes

    found = []
    for name in (part.strip() for item in names for part in item.split(",")):
        found.append(import_name(name, "probe") if ":" in name else name)
    resolve_probes(found)
    return found


def _folder(out: Path | None, model: str, as_json: bool) -> Path | None:
    """Where to write, checked before any work; None in JSON mode without --out."""
    if out is None and as_json:
        return None
    from headwise._folders import writable_folder

    name = Path(model).name if Path(model).exists() else model.replace("/", "--").replace("@", "-at-")
    return writable_folder(out if out is not None else Path(DEFAULT_OUT) / (name or "scan"))


def _other_map(compare: str | None) -> Any:
    """The head map to compare with, where a file is named; None for the name of a model."""
    if compare is None or not compare.endswith(".json"):
        return None
    from headwise.attend.head_map import HeadMap

    if not Path(compare).is_file():
        raise InputError(f"compare: {compare} is not there; give a heads.json or a model")
    return HeadMap.read(compare)


def _print(found: Any, comparison: dict[str, Any] | None, files: dict[str, Path]) -> None:
    from headwise.report.tables import print_scan

    main = found.layout.main
    heads = max(main.heads, default=0)
    size = f"{main.layers} layer{'s' * (main.layers != 1)}, up to {heads} head{'s' * (heads != 1)} each"
    print(f"{found.model}: {size}; {found.source}")
    print()
    print_scan(found)
    if comparison:
        print(f"\ncompared with {comparison['name']}:")
        for name, one in comparison["probes"].items():
            rank = "constant" if one["correlation"] is None else f"{one['correlation']:+.2f}"
            shared = "" if one["overlap"] is None else f", {one['overlap']:.0%} of the {one['k']} strongest in common"
            print(f"  {name}: rank correlation {rank}{shared}")
    for line in found.notes:
        print(f"note: {line}")
    if "report.html" in files:
        print(f"\nreport: {files['report.html']}")
        print(f"head map: {files['heads.json']} (use it with --map)")
