"""Arrows point one way: what each part of the package may import, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

import headwise

PACKAGE = Path(headwise.__file__).parent

BELOW_TRAINING = {"ops", "attend", "tasks", "hf", "attention", "slots", "memory", "models", "heads", "steering"}
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "tasks": {"ops"},
    "attend": {"ops"},
    "hf": {"ops", "attend"},
    "attention": {"ops", "attend"},
    "slots": {"ops", "attend", "attention"},
    "memory": {"ops", "attend", "hf", "attention", "slots"},
    "models": {"ops", "attend", "hf", "attention", "slots", "memory"},
    "heads": {"ops", "attend", "hf", "tasks"},
    "steering": {"ops", "attend", "attention", "hf", "tasks", "heads"},
    "adversarial": {"attend", "hf"},
    "training": BELOW_TRAINING | {"adversarial"},
    "recipes": BELOW_TRAINING | {"training"},
    "specimens": BELOW_TRAINING | {"training"},
    "report": BELOW_TRAINING | {"training", "specimens"},
    "api": BELOW_TRAINING | {"training", "specimens", "report"},
    "papers": BELOW_TRAINING | {"training", "specimens", "report", "api"},
    "commands": BELOW_TRAINING | {"training", "recipes", "specimens", "report", "api", "papers"},
    "cli": BELOW_TRAINING | {"training", "recipes", "specimens", "report", "api", "papers", "commands"},
}
# What every part may use: the version, the errors, files and lazy names.
BASE = {"", "errors"}
BASE_FILES = {"__init__", "_files", "_lazy"}
TORCH_ONLY = {"ops", "attend", "attention", "slots", "tasks"}
# Third-party packages that come with the core install; any other is an extra and is imported where it is used.
CORE = {
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "jaxtyping",
    "typer",
    "click",
    "rich",
    "tokenizers",
    "headwise",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its area, or its own name at the top."""
    return named(path.relative_to(PACKAGE).with_suffix("").parts[0])


def named(first: str) -> str:
    """The part that a module or package directly inside headwise belongs to; other private files are the API's."""
    if first in BASE_FILES or first.startswith("__version"):
        return ""
    if first == "__main__":
        return "cli"
    return "api" if first.startswith("_") else first


def imports(path: Path) -> list[tuple[str, list[str], bool, int]]:
    """(module, names, at import time, line) for each import that runs, also inside functions."""
    found = []

    def walk(node: ast.AST, now: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    walk(other, now)
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, [], now, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: import by the full name"
                found.append((child.module or "", [alias.name for alias in child.names], now, child.lineno))
            walk(child, now and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path):
    own = part(path)
    allowed = MAY_IMPORT.get(own, set()) | BASE | {own}
    wrong = []
    for module, names, now, line in imports(path):
        top, _, rest = module.partition(".")
        if top == "headwise":
            targets = [rest] if rest else names
            for target in targets:
                first = target.split(".")[0]
                known = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
                if known and named(first) not in allowed:
                    wrong.append(f"line {line}: {own or path.name} may not import headwise.{first}")
                if rest and "." not in rest and (PACKAGE / rest).is_dir():
                    modules = {file.stem for file in (PACKAGE / rest).glob("*.py")}
                    wrong += [
                        f"line {line}: import {name} from the module that defines it, not from headwise.{rest}"
                        for name in names
                        if name not in modules
                    ]
        elif top == "transformers" and own in TORCH_ONLY:
            wrong.append(f"line {line}: {own} may not import transformers")
        elif now and top not in CORE and top not in sys.stdlib_module_names:
            wrong.append(f"line {line}: {top} is no core dependency; import it inside the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_place():
    parts = {part(path) for path in FILES} - BASE
    assert parts <= set(MAY_IMPORT), "say in MAY_IMPORT where a new part stands"


def test_the_walk_sees_what_it_should(tmp_path: Path):
    path = tmp_path / "some.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import matplotlib\n"
        "def late():\n    import scipy\n"
        "class C:\n    import numpy\n"
    )
    seen = [(module, now) for module, _, now, _ in imports(path)]
    assert seen == [("typing", True), ("scipy", False), ("numpy", True)]
