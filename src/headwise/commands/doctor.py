"""`headwise doctor`: versions, devices, and which attention kernel is used, and why."""

import platform
from importlib import metadata
from typing import Any

from headwise.commands.common import Device, Dtype, Json, device_of, document, dtype_of, output

__all__ = ["doctor"]

REQUIRED = ("torch", "transformers", "safetensors", "numpy", "jaxtyping", "typer", "rich")
# Package -> the extra that brings it, and what it is for.
OPTIONAL = {
    "matplotlib": ("plots", "pictures"),
    "scikit-learn": ("tasks", "shipped data and baselines"),
    "pillow": ("vision", "scan --images"),
    "accelerate": ("train", "transformers' Trainer"),
    "datasets": ("data", "corpora of the hub"),
    "pyarrow": ("data", "corpora and scores in Parquet"),
    "ray": ("ray", "headwise score --engine ray"),
    "triton": ("gpu", "GPU kernels"),
}


def doctor(device: Device = None, dtype: Dtype = None, as_json: Json = False) -> None:
    """Say what headwise runs on here: versions, devices, the attention kernel that is taken and why."""
    with output(as_json) as said:
        found = examine(device_of(device), dtype_of(dtype))
        if as_json:
            return said.write(found)
        print(f"headwise {found['headwise']}, Python {found['python']}, {found['system']}")
        for name, version in found["versions"].items():
            print(f"  {name:14} {version or 'missing'}")
        for name, one in found["optional"].items():
            have = one["version"] or f"not installed (extra: {one['extra']})"
            print(f"  {name:14} {have}, for {one['for']}")
        print(f"devices: {', '.join(found['devices'])}; {found['threads']} threads")
        kernel = found["kernel"]
        print(f"attention on {kernel['device']} in {kernel['dtype']}: {kernel['path']}, because {kernel['why']}")
        print(f"  largest difference from the plain reference: {kernel['error']:.1e}")
        for name, one in found["specimens"].items():
            print(f"specimen {name}: {one}")


def examine(device: str | None = None, dtype: Any = None) -> dict[str, Any]:
    """The document that the command prints."""
    import torch

    from headwise.specimens.registry import FOLDER, specimen_names

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    specimens = {}
    for name in specimen_names():
        stored = (FOLDER / "weights" / name / "config.json").is_file()
        by_hand = not (FOLDER / "weights" / name).exists() and name.startswith("planted")
        specimens[name] = "ready" if stored or by_hand else f"no weights; make them with headwise train {name}"
    return document(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in REQUIRED},
        optional={n: {"version": _version(n), "extra": e, "for": what} for n, (e, what) in OPTIONAL.items()},
        devices=devices,
        threads=torch.get_num_threads(),
        kernel=_kernel(device, torch.float32 if dtype is None else dtype),
        specimens=specimens,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _kernel(device: str, dtype: Any) -> dict[str, Any]:
    """Which path a call on this device and in this dtype takes, why, and how far it is from the reference."""
    import torch

    from headwise.attend.kernels import attention_with_lse, fused_available

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 65, 32, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    fused = fused_available(q, k, v)
    kind = torch.device(device).type
    if fused:
        operator = {"cpu": "flash attention for CPU", "cuda": "memory-efficient attention"}[kind]
        path, why = f"fused ({operator})", f"torch {torch.__version__.partition('+')[0]} offers it for this dtype"
    else:
        path = "block by block in plain torch"
        why = f"torch has no fused operator with log-sum-exp for {str(dtype).removeprefix('torch.')} on {kind}"
    out, _ = attention_with_lse(q, k, v, causal=True)
    reference, _ = attention_with_lse(*(x.double().cpu() for x in (q, k, v)), causal=True, implementation="reference")
    error = float((out.double().cpu() - reference).abs().max())
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "path": path,
        "why": why,
        "error": error,
        "note": "soft-capped scores, gradients with respect to a mask and empty calls always go block by block",
    }
