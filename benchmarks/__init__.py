"""What `headwise bench` measures: one registry of inputs, variants and rivals.

Every module of this folder that defines `benchmark()` is one benchmark. Ratios only: the variants of an input are run
in turn in one process, short calls several times, and each is divided by the baseline of its own round. Peak memory
comes from a fresh process a variant, or is what one call holds at most. Nothing here asserts a time.
"""

import ctypes
import gc
import importlib
import pkgutil
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Benchmark", "Row", "Setting", "UnknownInput", "Variant", "names", "run", "setting"]


LEAST_SECONDS, MOST_CALLS = 0.02, 50  # short calls are repeated in a round
NEAREST = 5  # inputs that are named where none is meant


class UnknownInput(ValueError):
    """No input that was asked for is there."""


@dataclass
class Setting:
    """Where benchmarks run: they read `setting` when they make a variant."""

    device: str = "cpu"
    dtype: str = "float32"


setting = Setting()


@dataclass
class Variant:
    """One way of doing the work of an input.

    make: prepares and returns the function that is timed; it is called once, before timing. skip: why it does not run.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    skip: str | None = None


@dataclass
class Benchmark:
    """Inputs by name, each with its variants; the first variant of an input is its baseline.

    check: raises when the variants do not agree with each other; nothing is timed then. call: memory is what one call
    holds beyond what was there before, in this process; otherwise that of a process for each variant. digest: what a
    reader wants to know, from the rows, a line each.
    """

    name: str
    inputs: dict[str, Callable[[], list[Variant]]]
    check: Callable[[], None] = lambda: None
    rounds: int = 7
    digest: Callable[[Sequence["Row"]], list[dict[str, Any]]] | None = None
    call: bool = False


@dataclass
class Row:
    """One line of the result: medians over rounds, `spread` the interquartile range of the ratio.

    peak_ratio: of the memory of whole processes. peak_mib: what a call held, in MiB.
    """

    name: str
    input: str
    variant: str
    median_ratio: float | None
    spread: float | None
    peak_ratio: float | None
    skipped: str | None
    peak_mib: float | None = None


def names() -> list[str]:
    """The benchmarks that there are."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def load(name: str) -> Benchmark:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").benchmark()


def run(
    wanted: list[str] | None = None,
    *,
    inputs: list[str] | None = None,
    rounds: int | None = None,
    memory: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Run benchmarks and return the document that `headwise bench --json` prints.

    inputs: only inputs whose name contains one of these. rounds: how often each variant is timed. memory: also measure
    peak memory. device: None means the GPU where there is one. Raises UnknownInput where no input has such a name.
    """
    import torch

    setting.device, setting.dtype = device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype
    rows: list[Row] = []
    digests: dict[str, list[dict[str, Any]]] = {}
    benchmarks = {name: load(name) for name in wanted or every()}
    chosen = {
        name: {label: variants for label, variants in benchmark.inputs.items() if _named(label, inputs)}
        for name, benchmark in benchmarks.items()
    }
    if not any(chosen.values()):
        raise UnknownInput(_unknown(inputs or [], benchmarks))
    for name, benchmark in benchmarks.items():
        if not chosen[name]:
            continue
        benchmark.check()
        own: list[Row] = []
        for label, variants in chosen[name].items():
            log(f"{name} {label}")
            own += _measure(benchmark, label, variants(), rounds or benchmark.rounds, memory, log)
        if benchmark.digest is not None:
            digests[benchmark.name] = benchmark.digest(own)
        rows += own
    found = {"machine": machine() | {"dtype": dtype}, "versions": versions(), "rows": [asdict(row) for row in rows]}
    return found | ({"digests": digests} if digests else {})


def every() -> list[str]:
    """What is run when nothing is named: `attention` gathers others, which would run twice."""
    return [name for name in names() if name != "attention"]


def _unknown(wanted: list[str], benchmarks: dict[str, Benchmark]) -> str:
    """What to say of inputs that are not there: the nearest names, and where the others are to be found."""
    labels = [label for benchmark in benchmarks.values() for label in benchmark.inputs]
    near = sorted(labels, key=lambda label: -max(_likeness(one, label) for one in wanted))[:NEAREST]
    owner = next(name for name, benchmark in benchmarks.items() if near[0] in benchmark.inputs).replace("_", "-")
    more = f" (of {len(labels)}; `headwise bench {owner} --list` names those of {owner})"
    more = more if len(labels) > len(near) else ""
    return f"bench: no input has {' or '.join(wanted)} in its name; nearest are {'; '.join(near)}{more}"


def _likeness(wanted: str, label: str) -> float:
    """How much of what was asked for is in a name, in order, 0 to 1."""
    blocks = SequenceMatcher(None, wanted.lower(), label.lower(), autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size > 1) / max(1, len(wanted))


def _named(label: str, wanted: list[str] | None) -> bool:
    return not wanted or any(one in label for one in wanted)


def machine() -> dict:
    import torch

    cuda = torch.cuda.get_device_name() if setting.device.startswith("cuda") else None
    return {"system": platform.system(), "processor": _processor(), "threads": torch.get_num_threads(), "gpu": cuda}


def versions() -> dict[str, str | None]:
    import headwise

    # Run from a source tree, it may be installed in no environment.
    found: dict[str, str | None] = {"python": platform.python_version(), "headwise": headwise.__version__}
    for package in ("torch", "transformers", "transformer-lens", "nnsight"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _measure(
    benchmark: Benchmark, label: str, variants: list[Variant], rounds: int, memory: bool, log: Callable[[str], None]
) -> Iterator[Row]:
    ready = [(variant, variant.make()) for variant in variants if variant.skip is None]
    for _, function in ready:
        function()  # warm-up
    calls = {
        variant.name: max(1, min(MOST_CALLS, round(LEAST_SECONDS / _time(function, 1)))) for variant, function in ready
    }
    times: dict[str, list[float]] = {variant.name: [] for variant, _ in ready}
    gc.collect()
    gc.freeze()  # what is there stays: looking through it again before every call takes longer than the calls
    for _ in range(rounds):
        for variant, function in ready:
            gc.collect()
            times[variant.name].append(_time(function, calls[variant.name]))
    peaks: dict[str, float | None] = {}
    held: dict[str, float | None] = {}
    if memory and benchmark.call:
        held = {variant.name: _held(function) for variant, function in ready}
    elif memory:
        peaks = {variant.name: _peak(benchmark.name, label, variant.name) for variant, _ in ready}
    gc.unfreeze()
    baseline = variants[0].name
    for variant in variants:
        if variant.skip is not None:
            log(f"  {variant.name}: skipped, {variant.skip}")
            yield Row(benchmark.name, label, variant.name, None, None, None, variant.skip)
            continue
        ratios = [mine / base for mine, base in zip(times[variant.name], times[baseline], strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        peak, base = peaks.get(variant.name), peaks.get(baseline)
        row = Row(
            benchmark.name,
            label,
            variant.name,
            round(statistics.median(ratios), 3),
            round(quarters[2] - quarters[0], 3),
            round(peak / base, 2) if peak and base else None,
            None,
            held.get(variant.name),
        )
        memory_of = f"{row.peak_mib} MiB" if benchmark.call else f"{row.peak_ratio}x"
        log(f"  {row.variant}: {row.median_ratio}x (spread {row.spread}), memory {memory_of}")
        yield row


def _time(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call. One thread on a CPU is timed by the processor's time: others' work does not count."""
    import torch

    alone = setting.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    _wait()
    start = clock()
    for _ in range(calls):
        function()
    _wait()
    return max(1e-9, clock() - start) / calls


def _wait() -> None:
    """Work on a GPU goes on after the call that asked for it."""
    if setting.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _held(function: Callable[[], object]) -> float | None:
    """The most that one call holds beyond what is there before it, in MiB; None where the system does not say."""
    gc.collect()
    if setting.device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that using it again is seen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is the present size again
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    function()
    after = _status("VmHWM")
    return None if before is None or after is None else round(max(0.0, after - before) / 1024, 2)


def _status(key: str) -> float | None:
    """A size of this process in KiB."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None


def _peak(name: str, label: str, variant: str) -> float | None:
    """Peak memory of one variant in a process of its own, in KiB."""
    command = [sys.executable, "-m", "benchmarks", name, label, variant, setting.device, setting.dtype]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else None


def report_peak(name: str, label: str, wanted: str, device: str, dtype: str) -> float:
    """Run one variant twice and return the process's peak memory in KiB: resident, or allocated on the GPU."""
    setting.device, setting.dtype = device, dtype
    variant = next(v for v in load(name).inputs[label]() if v.name == wanted)
    function = variant.make()
    function()
    function()
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1024
    most = _status("VmHWM")  # what getrusage says includes the parent's size at the fork
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if most is None else most
