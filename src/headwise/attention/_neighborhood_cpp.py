"""The C++ kernel of neighbourhood attention: compiled at first use where a compiler is found, kept for later runs.

`HEADWISE_CPP=0` turns it off. The shared object lies in the user's cache folder (`XDG_CACHE_HOME`, `~/.cache`) under a
name made from the source, the compiler and the processor, and is called through ctypes; no build tool is needed.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from headwise.attention._neighborhood_axes import Axis, groups_of

SOURCE = Path(__file__).with_name("_neighborhood.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")


def unavailable() -> str | None:
    """Why the kernel cannot be used here; None where it can. Compiles it at the first call."""
    return "HEADWISE_CPP is 0" if _off() else _built()[1]


def ready() -> bool:
    """Whether the kernel can be used here without compiling it: this process or an earlier one has done so."""
    target = _target()
    return not _off() and target is not None and target.exists() and _built()[1] is None


def _off() -> bool:
    return os.environ.get("HEADWISE_CPP", "1").lower() in ("0", "off", "no", "false")


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := _which(name))), None)


def _which(name: str) -> str | None:
    return shutil.which(name.split()[0])


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("flags", "Features"))


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headwise"


@cache
def _target() -> Path | None:
    """Where the kernel of this compiler and processor lies, or will lie; None where there is no compiler."""
    compiler = _compiler()
    if compiler is None:
        return None
    parts = [SOURCE.read_bytes(), *(x.encode() for x in (compiler, " ".join(FLAGS), _processor()))]
    return _folder() / f"neighborhood-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"


@cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded kernel, or the reason why there is none."""
    compiler, target = _compiler(), _target()
    if compiler is None or target is None:
        return None, "no C++ compiler was found (CXX, g++, clang++)"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            # Renamed when complete: others may build it too.
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / target.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
                if done.returncode:
                    return None, f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}"
                made.replace(target)
        library = ctypes.CDLL(str(target))
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the kernel could not be built or loaded: {error}"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.headwise_neighborhood_forward.argtypes = [
        *(pointer,) * 9, ctypes.c_float, number, number, number,
    ]  # fmt: skip
    library.headwise_neighborhood_forward.restype = None
    return library, None


@lru_cache(maxsize=256)
def _windows(axes: tuple[Axis, ...]) -> list[Tensor]:
    """start and stop of three axes, int32; missing leading axes have length 1."""
    with torch.inference_mode(False):
        found = [torch.tensor([edge], dtype=torch.int32) for _ in range(3 - len(axes)) for edge in (0, 1)]
        return found + [edge.to(torch.int32).contiguous() for axis in axes for edge in axis.windows()]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs `[b h *S e]` and log-sum-exp `[b h *S]` of float32 tensors on the CPU, as `tiles_forward` gives them."""
    if all(axis.dilation == 1 for axis in axes):
        return _group(q, k, v, bias, tuple(axes), scale)
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    for where, inner in groups_of(axes):
        places = (slice(None), slice(None), *where)
        out[places], lse[places] = _group(q[places], k[places], v[places], bias, inner, scale)
    return out, lse


def _group(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Axis, ...], scale: float
) -> tuple[Tensor, Tensor]:
    library, reason = _built()
    if library is None:
        raise RuntimeError(f"neighborhood_attention: the C++ kernel is not available: {reason}")
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])
    if not out.numel():
        return out, lse
    bias = None if bias is None else bias.contiguous()
    missing = 3 - len(axes)
    grid = [1] * missing + [axis.length for axis in axes]
    sizes = (ctypes.c_long * 8)(q.shape[0], q.shape[1], k.shape[1], *grid, q.shape[-1], v.shape[-1])
    kernel = (ctypes.c_long * 3)(*[1] * missing, *(axis.kernel for axis in axes))
    edges = _windows(axes)
    windows = (ctypes.c_void_p * 6)(*(edge.data_ptr() for edge in edges))
    pairs, threads = q.shape[0] * k.shape[1], torch.get_num_threads()
    parts = max(1, min(grid[0] * grid[1], -(-threads // pairs)))
    items = pairs * parts

    def work(begin: int, end: int) -> None:
        library.headwise_neighborhood_forward(
            *(x.data_ptr() for x in (q, k, v, out, lse)),
            None if bias is None else bias.data_ptr(),
            ctypes.addressof(sizes), ctypes.addressof(windows), ctypes.addressof(kernel),
            scale, parts, begin, end,
        )  # fmt: skip

    workers = min(threads, items)
    if workers == 1:
        work(0, items)
    else:  # ctypes lets go of the interpreter's lock during the call
        cuts = [items * i // workers for i in range(workers + 1)]
        list(_pool(workers).map(work, cuts[:-1], cuts[1:]))
    return out, lse


@lru_cache(maxsize=4)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="headwise")


if hasattr(os, "register_at_fork"):  # a forked child has none of the pool's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
