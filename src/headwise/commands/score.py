"""`headwise score`: a corpus scored by attention influence."""

from pathlib import Path
from typing import Annotated, Any

import typer

from headwise.commands.common import (
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

__all__ = ["score"]


def score(
    corpus: Annotated[str, typer.Argument(help="A file or folder of .jsonl, .txt (also .gz), .parquet; or hub:NAME.")],
    out: Annotated[Path, typer.Option("--out", help="A .jsonl or .parquet file, or a folder of parts.")],
    model: Annotated[str, typer.Option("--model", help="A hub id, a local folder, or a specimen's name.")] = "text",
    heads: Annotated[
        str | None, typer.Option("--heads", help="Heads to mask; left out: the retrieval heads, by their scores.")
    ] = None,
    map_file: Annotated[Path | None, typer.Option("--map", help="A heads.json with retrieval scores.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="What is left of a masked head: uniform, zero or first.")] = (
        "uniform"
    ),
    prefix: Annotated[int, typer.Option("--prefix", help="Tokens of each document that do not count.")] = 0,
    context: Annotated[int | None, typer.Option("--context", help="Tokens read at once; what the model reads.")] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="From one window of a long document to the next; no overlap.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text-field", help="Field with the text; text, content, ...")] = None,
    domain: Annotated[str, typer.Option("--domain-field", help="Field that names a document's domain.")] = "domain",
    identity: Annotated[str, typer.Option("--id-field", help="Field with a document's identifier.")] = "id",
    form: Annotated[str | None, typer.Option("--format", help="Of a folder's parts: jsonl or parquet.")] = None,
    window: Annotated[int, typer.Option("--window", help="Documents scored together; a kill costs one window.")] = 512,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="Tokens of one forward.")] = 8192,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray for Ray Data.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="Actors of ray; one fewer than cores.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Score every document of CORPUS by how much its loss rises with the retrieval heads masked.

    Streams a corpus of any size. Stopped or killed, the same command goes on where it was, to the same output.
    """
    with output(as_json) as said:
        for name, value, known in (
            ("mode", mode, ("uniform", "zero", "first")),
            ("engine", engine, ("local", "ray")),
            ("format", form, (None, "jsonl", "parquet")),
        ):
            if value not in known:
                choices = ", ".join(one for one in known if one)
                raise InputError(f"{name}: {value!r} is unknown; choose from {choices}")
        options: dict[str, Any] = {
            "heads": heads, "mode": mode, "prefix": prefix, "context": context, "stride": stride, "text": text,
            "domain": domain, "id": identity, "format": form, "window": window, "batch_tokens": batch_tokens,
            "engine": engine, "workers": workers, "seed": seed,
        }  # fmt: skip
        run(said, corpus, model, out, map_file, device, dtype, options)


def run(
    said: Output,
    corpus: str,
    model: str,
    out: Path,
    map_file: Path | None,
    device: str | None,
    dtype: str | None,
    options: dict[str, Any],
) -> None:
    from headwise.commands.steer import read_map

    head_map = read_map(map_file)
    from headwise.api import score_corpus

    quiet_libraries()
    found = score_corpus(
        corpus, model, out=out, head_map=head_map, device=device_of(device), dtype=dtype_of(dtype),
        progress=said.progress, **options,
    )  # fmt: skip
    said.clear()
    if said.as_json:
        return said.write(document(**found))
    header, flags = found["header"], found["flags"]
    print(
        f"{header['model']}, heads {', '.join(header['heads'])} masked ({header['mode']}), {header['threads']} threads"
    )
    print(f"{found['documents']:,} documents, {found['scored']:,} scored, {found['tokens']:,} tokens")
    print(f"long documents in windows of {header['context']:,} tokens, {header['stride']:,} apart")
    for name, count in flags.items():
        print(f"without a score, {name}: {count:,}")
    for line in found["malformed"]:
        print(f"  {line}")
    if flags.get("malformed", 0) > len(found["malformed"]):
        print("  ... all are in the output, with the flag malformed")
    for name, value in found["correlations"].items():
        if value is not None:
            print(f"correlation of the score with {name.replace('_', ' ')}: {value:+.2f}")
    print(f"written: {', '.join(found['files'][:3])}{' ...' if len(found['files']) > 3 else ''}")
