"""What every command shares: its options, its document on stdout, its progress and notes on stderr.

Nothing here imports torch, so that `headwise --help` and `headwise papers` answer at once.
"""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import headwise
from headwise.errors import InputError

__all__ = [
    "DEFAULT_OUT",
    "Device",
    "Dtype",
    "Json",
    "Output",
    "Seed",
    "device_of",
    "document",
    "dtype_of",
    "output",
    "quiet_libraries",
    "silence",
]

DEFAULT_OUT = "headwise-out"
EVERY = 15.0  # seconds between lines of progress where stderr is no terminal

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is drawn at random.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps; left out: the GPU where there is one.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, float64; left out: float32 on the CPU, else as stored."),
]

_DTYPES = {
    "float32": "float32", "fp32": "float32", "float64": "float64", "fp64": "float64", "bfloat16": "bfloat16",
    "bf16": "bfloat16", "float16": "float16", "fp16": "float16",
}  # fmt: skip


def document(**fields: Any) -> dict[str, Any]:
    """A document with the marks that all of them carry."""
    return {"headwise": headwise.__version__, "schema": 1, **fields}


def _finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class Output:
    """Where a command's words go. In JSON mode stdout holds the document alone."""

    def __init__(self, as_json: bool, stdout: Any) -> None:
        self.as_json, self.stdout = as_json, stdout
        self._said, self._shown = 0.0, False

    def write(self, value: Any) -> None:
        """Print the document (JSON mode)."""
        print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=1), file=self.stdout, flush=True)

    def note(self, text: str) -> None:
        """Say something beside the result; in JSON mode the document says it."""
        self.clear()
        if not self.as_json:
            print(" ".join(text.split()), file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        """Say what a long job is doing."""
        self.clear()
        print(" ".join(text.split()), file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """Show how far the work is: one line that is written over, or a line now and then where nobody looks on."""
        line = f"{what} {done:,} of {total:,}" if total > 1 else what
        if sys.stderr.isatty():
            share = round(24 * done / total) if total > 1 else 0
            bar = f" {'█' * share}{'·' * (24 - share)}" if total > 1 else " ..."
            print(f"\r\x1b[K{line}{bar}", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif not self._said:
            self._said = time.monotonic()  # the work begins; what is done within seconds is not worth a line
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line of progress away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """A command's output. In JSON mode whatever else is printed meanwhile goes to stderr."""
    out = Output(as_json, sys.stdout)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        # Libraries warn about what a user of the command cannot change; headwise's own warnings are meant for them.
        if "headwise" in filename:
            out.note(f"note: {message}")

    with contextlib.ExitStack() as stack:
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        warnings.showwarning = show
        stack.callback(setattr, warnings, "showwarning", shown)
        stack.callback(out.clear)
        try:
            yield out
        except BrokenPipeError:
            silence()
            raise typer.Exit(0) from None


def silence() -> None:
    """Send stdout nowhere: whoever read it has closed it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_libraries() -> None:
    """Keep transformers' progress bars and advice off the terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def device_of(name: str | None) -> str | None:
    """The device, checked. Raises InputError for one that torch cannot use here."""
    if name is None:
        return None
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"device: {name!r} cannot be used here; try cpu, or leave it out") from None
    return name


def dtype_of(name: str | None) -> Any:
    """The torch dtype of a name. Raises InputError for an unknown one."""
    if name is None:
        return None
    import torch

    if name not in _DTYPES:
        raise InputError(f"dtype: {name!r} is unknown; choose {', '.join(dict.fromkeys(_DTYPES.values()))}")
    return getattr(torch, _DTYPES[name])
