"""The command line: `headwise COMMAND ...`.

Exit codes: 0 done, 1 a claim or check failed, 2 the input was wrong (one line on stderr), 130 interrupted.
"""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer
from typer.core import TyperGroup

import headwise
from headwise.commands import doctor, inventory, measure, papers, scan, score, select, steer
from headwise.commands.common import Json, output, silence
from headwise.errors import HeadwiseError, InputError

__all__ = ["app", "main", "run"]

_INTERRUPTED = threading.Event()


class _Group(TyperGroup):
    context_class = typer.Context  # what a callback's annotation promises; left alone it is the class above it


app = typer.Typer(
    name="headwise",
    cls=_Group,
    help="See what every attention head of a model does, and change how it attends.",
    epilog="Docs and papers: `headwise papers`. Everything works offline on the shipped specimen.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("scan", short_help="Score every head of a model; write a map and a report.")(scan.scan)
app.command("steer", short_help="Write with and without edits, and show both.")(steer.steer)
app.command("score", short_help="Score a corpus by attention influence.")(score.score)
app.command("select", short_help="Keep the best-scored documents of each domain.")(select.select)
app.command("papers", short_help="The catalogue: what each paper is, and what came out.")(papers.papers)
app.command("reproduce", short_help="Run a paper's claims at small scale.")(papers.reproduce)
app.command("bench", short_help="Speed and memory beside what one would use instead.")(measure.bench)
app.command("train", short_help="Train a specimen again from nothing.")(measure.train)
app.command("doctor", short_help="Versions, devices, attention kernels.")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    listing: Annotated[bool, typer.Option("--list", help="List probes, edits, key groups and specimens.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    as_json: Json = False,
) -> None:
    if version:
        print(headwise.__version__)
    elif listing:
        with output(as_json) as out:
            inventory.show(out)
    elif context.invoked_subcommand is None:
        print(context.get_help())
    elif as_json:
        raise InputError(f"--json stands after the command: headwise {context.invoked_subcommand} --json")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Whatever goes wrong is one line on stderr."""
    from typer import Abort
    from typer.exceptions import TyperException

    try:
        result = app(
            args=list(sys.argv[1:] if arguments is None else arguments), prog_name="headwise", standalone_mode=False
        )
        sys.stdout.flush()
        if result == 130:  # typer's word for an interruption
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, Abort):
        return _say("interrupted", 130)
    except BrokenPipeError:  # `headwise papers | head`: the reader has seen enough
        silence()
        return 0
    except TyperException as error:
        return _say(error.format_message(), 2)
    except (HeadwiseError, ValueError, OSError) as error:
        return _say(str(error), 2)
    except Exception as error:
        if os.environ.get("HEADWISE_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error}; this is a fault of headwise, HEADWISE_TRACEBACK=1 shows where"
        if "memory" in type(error).__name__.lower() or "can't allocate memory" in str(error):
            text = "out of memory; try a smaller --batch-tokens or --window, or --dtype bfloat16"
        return _say(text, 1)


def _say(text: str, code: int) -> int:
    if _INTERRUPTED.is_set():  # whatever a library made of the exception
        text, code = "interrupted", 130
    print(f"headwise: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, put off while a module is being imported or an object destroyed.

    There the exception is taken for a missing module, dropped, or ends the process from C++.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" or frame.f_code.co_name == "__del__":
            threading.Timer(0.05, _thread.interrupt_main).start()
            return
        frame = frame.f_back
    _INTERRUPTED.set()
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.exit(run())
