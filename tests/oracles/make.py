"""Write fixtures from outside implementations: numbers that our code must agree with.

Each other script in this folder says in its header what it needs (PEP 723 inline metadata) and is called with the
path of the fixture that it has to write. It runs in an environment of its own under .venv-oracles/, because the peers'
dependencies do not go together with ours. The fixtures are committed; the test suite reads them and needs no peer.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)


def dependencies(script: Path) -> list[str]:
    """What the script's header asks for. ValueError where it has no header."""
    return header(script)["dependencies"]


def alone(script: Path) -> list[str]:
    """Packages of the header's `[tool.headwise] alone`: installed last, without what they depend on and built with what
    is there, for peers that would pull another torch or need torch to build."""
    return header(script).get("tool", {}).get("headwise", {}).get("alone", [])


def header(script: Path) -> dict:
    found = HEADER.search(script.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{script}: has no '# /// script' header; name its dependencies there")
    lines = [line.removeprefix("#").removeprefix(" ") for line in found[1].splitlines()]
    return tomllib.loads("\n".join(lines))


def environment(script: Path) -> Path:
    """A Python with the script's dependencies, made on first use and again when they change."""
    folder = ROOT / ".venv-oracles" / script.stem
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted, last = dependencies(script), alone(script)
    if not stamp.is_file() or stamp.read_text() != "\n".join(wanted + last):
        venv.create(folder, with_pip=True, clear=True)
        # torch first and alone, so that a peer cannot pull a newer CUDA build.
        torch = [name for name in wanted if name.startswith("torch==")]
        for packages in filter(None, (torch, wanted)):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if last:
            options = ["--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([python, "-m", "pip", "install", *options, *last], check=True)
        stamp.write_text("\n".join(wanted + last))
    return python


def main(names: list[str]) -> None:
    scripts = sorted(path for path in HERE.glob("*.py") if path.name != "make.py")
    unknown = set(names) - {script.stem for script in scripts}
    if unknown:
        sys.exit(f"oracles: unknown {sorted(unknown)}; there are {[script.stem for script in scripts]}")
    FIXTURES.mkdir(exist_ok=True)
    failed = []
    for script in scripts:
        if names and script.stem not in names:
            continue
        print(f"{script.stem}: {', '.join(dependencies(script))}", flush=True)
        out = FIXTURES / f"{script.stem}.safetensors"
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
        try:
            # -P: a script named after its peer must not be imported in its place.
            subprocess.run([environment(script), "-P", script, out], check=True, env=os.environ | quiet)
        except subprocess.CalledProcessError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
            failed.append(script.stem)
            continue
        print(f"  wrote {out.relative_to(ROOT)}, {out.stat().st_size // 1024} KiB", flush=True)
    if failed:
        sys.exit(f"oracles: no new fixture of {', '.join(failed)}; the reasons stand above")


if __name__ == "__main__":
    main(sys.argv[1:])
