"""`headwise bench`: speed and memory beside what one would use instead."""

import importlib
import sys
from typing import Annotated, Any

import typer

from headwise.commands.common import Device, Dtype, Json, device_of, document, dtype_of, output, quiet_libraries
from headwise.errors import InputError

__all__ = ["bench"]


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
