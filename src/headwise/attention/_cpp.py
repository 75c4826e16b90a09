"""C++ kernels for processors: compiled at first use where a compiler is found, kept for later runs.

`HEADWISE_CPP=0` turns them off. A shared object lies in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`) under a
name made from the source, the compiler and the processor, and is called through ctypes; no build tool is needed.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Kernel", "spread"]

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")


class Kernel:
    """The functions of `_{name}.cpp` in this folder. functions: name -> the ctypes of its arguments; none returns."""

    def __init__(self, name: str, functions: Mapping[str, Sequence[Any]]) -> None:
        self.name, self.source, self.functions = name, FOLDER / f"_{name}.cpp", functions

    def unavailable(self) -> str | None:
        """Why the kernel cannot be used here; None where it can. Compiles it at the first call."""
        return "HEADWISE_CPP is 0" if _off() else self._built[1]

    def ready(self) -> bool:
        """Whether it can be used here without compiling it: this process or an earlier one has done so."""
        return not _off() and self._target is not None and self._target.exists() and self._built[1] is None

    def library(self) -> ctypes.CDLL:
        """The loaded functions. Raises RuntimeError where there are none."""
        library, reason = self._built
        if library is None:
            raise RuntimeError(f"the C++ kernel of {self.name} is not available: {reason}")
        return library

    @cached_property
    def _target(self) -> Path | None:
        """Where the kernel of this compiler and processor lies, or will lie; None where there is no compiler."""
        compiler = _compiler()
        if compiler is None:
            return None
        source = self.source.read_bytes()
        headers = [FOLDER / name.decode() for name in re.findall(rb'#include "([^"]+)"', source)]
        parts = [source, *(one.read_bytes() for one in headers)]
        parts += [x.encode() for x in (compiler, " ".join(FLAGS), _processor())]
        return _cache() / f"{self.name}-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"

    @cached_property
    def _built(self) -> tuple[ctypes.CDLL | None, str | None]:
        """The loaded kernel, or the reason why there is none."""
        compiler, target = _compiler(), self._target
        if compiler is None or target is None:
            return None, "no C++ compiler was found (CXX, g++, clang++)"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                # Renamed when complete: others may build it too.
                with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                    made = Path(scratch) / target.name
                    command = [compiler, *FLAGS, str(self.source), "-o", str(made)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
                    if done.returncode:
                        return None, f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}"
                    made.replace(target)
            library = ctypes.CDLL(str(target))
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"the kernel could not be built or loaded: {error}"
        for name, arguments in self.functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = list(arguments), None
        return library, None


def _off() -> bool:
    return os.environ.get("HEADWISE_CPP", "1").lower() in ("0", "off", "no", "false")


@cache
def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := _which(name))), None)


def _which(name: str) -> str | None:
    return shutil.which(name.split()[0])


@cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("flags", "Features"))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwise"


def spread(work: Callable[[int, int], None], items: int) -> None:
    """`work(begin, end)` over the items, in as many threads as torch uses; ctypes lets go of the interpreter's lock."""
    workers = min(torch.get_num_threads(), items)
    if workers <= 1:
        return work(0, items)
    cuts = [items * i // workers for i in range(workers + 1)]
    list(_pool(workers).map(work, cuts[:-1], cuts[1:]))


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="headwise")


if hasattr(os, "register_at_fork"):  # a forked child has none of the pool's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
