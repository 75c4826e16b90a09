"""Names that arrive on first use: an area exports what its modules list in ``__all__``.

The lists are read by parsing, without importing, so that adding a module edits no existing file and
``import headwise`` stays free of torch. The scan runs at the first look at an area, not at import.
"""

import ast
import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["area", "export_map", "module_names", "read_exports", "top_level"]


def read_exports(path: Path) -> list[str]:
    """The names in a module's ``__all__``, read by parsing. Empty where a module has none.

    Raises ValueError when ``__all__`` is not a plain list or tuple of strings.
    """
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if not isinstance(node, ast.Assign):
            continue
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            continue
        try:
            names = ast.literal_eval(node.value)
        except ValueError:
            names = None
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: __all__ is computed; expected a plain list of strings, because it is read unrun")
        return list(names)
    return []


def module_names(folder: Path) -> list[str]:
    """Public modules and packages directly inside a package folder, sorted."""
    files = [path.stem for path in folder.glob("*.py")]
    folders = [path.parent.name for path in folder.glob("*/__init__.py")]
    return sorted(name for name in files + folders if not name.startswith("_"))


@cache
def export_map(package: str, folder: Path) -> dict[str, str]:
    """Public name -> full name of the module that defines it, for every module directly in an area.

    Raises ValueError when two modules export one name, or when a name is also a module of the area
    (importing that module would hide it).
    """
    owners: dict[str, str] = {}
    modules = module_names(folder)
    for module in modules:
        path = folder / f"{module}.py"
        if not path.exists():
            continue
        for name in read_exports(path):
            if name in owners:
                raise ValueError(
                    f"{package}: {name!r} is exported by {owners[name]} and by {package}.{module}; "
                    "a name has one home, rename or remove one of them"
                )
            if name in modules:
                raise ValueError(
                    f"{package}: {name!r}, exported by {package}.{module}, is also the name of a module of the area; "
                    "importing that module would hide it, rename one of them"
                )
            owners[name] = f"{package}.{module}"
    return owners


def area(package: str, path: Iterable[str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of an area package: its modules, and the names they export."""
    folder = Path(next(iter(path)))

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return sorted(export_map(package, folder))
        if not name.startswith("_"):
            if name in module_names(folder):
                return importlib.import_module(f"{package}.{name}")
            owner = export_map(package, folder).get(name)
            if owner is not None:
                return getattr(importlib.import_module(owner), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*export_map(package, folder), *module_names(folder)})

    return __getattr__, __dir__


def top_level(
    package: str, path: Iterable[str], *, api: str, also: Mapping[str, str], always: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """As `area`, for the top package: its areas, the names of the module ``api``, and a few more.

    also: name -> module of functions that belong at the top but live in a layer above ``api``.
    """
    folder = Path(next(iter(path)))

    def exports() -> dict[str, str]:
        source = folder / f"{api}.py"
        owners = dict(also)
        for name in read_exports(source) if source.exists() else []:
            if name in owners:
                raise ValueError(
                    f"{package}: {name!r} is exported by {owners[name]} and by {package}.{api}; rename one"
                )
            owners[name] = f"{package}.{api}"
        clash = sorted(set(owners) & set(module_names(folder)))
        if clash:
            raise ValueError(f"{package}.{api}: {', '.join(clash)} is also a module of {package}; rename the function")
        return owners

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return sorted([*exports(), *always])
        if not name.startswith("_"):
            if name in module_names(folder):
                return importlib.import_module(f"{package}.{name}")
            owner = exports().get(name)
            if owner is not None:
                return getattr(importlib.import_module(owner), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*exports(), *module_names(folder), *always})

    return __getattr__, __dir__
