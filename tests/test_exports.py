"""Names: each exported once, each real, none hidden by a module of the same namespace."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import headwise
from headwise._lazy import area, export_map, module_names, read_exports, top_level

PACKAGE = Path(headwise.__file__).parent
AREAS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py") if "headwise._lazy" in path.read_text())


def is_entry(path: Path) -> bool:
    """A paper or a specimen: one of many modules with the same few names, reached through their registry."""
    text = path.read_text(encoding="utf-8")
    return "\nPAPER = Paper(" in text or (path.parent.name == "specimens" and "\nNAME = " in text)


MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not any(part.startswith("_") for part in path.relative_to(PACKAGE).with_suffix("").parts) and not is_entry(path)
)


def dotted(path: Path) -> str:
    return ".".join(("headwise", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("name", AREAS)
def test_an_area_exports_each_name_once(name: str):
    exported = export_map(f"headwise.{name}", PACKAGE / name)
    package = importlib.import_module(f"headwise.{name}")
    assert set(exported) <= set(dir(package))
    for attribute in exported:
        value = getattr(package, attribute)
        # A public function under the name of a package would be taken for it.
        assert not (inspect.isfunction(value) and attribute in AREAS and attribute != name), attribute


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_public_module_lists_what_it_offers(path: Path):
    names = read_exports(path)
    assert "\n__all__ = " in path.read_text(encoding="utf-8"), f"{path} has no __all__"
    assert len(set(names)) == len(names)
    module = importlib.import_module(dotted(path))
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing


def test_the_top_names_are_real_and_hide_nothing():
    names = headwise.__all__
    assert len(set(names)) == len(names)
    assert not set(names) & set(AREAS)
    for name in names:
        getattr(headwise, name)


def test_importing_headwise_imports_neither_torch_nor_transformers():
    code = "import sys, headwise; dir(headwise); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'headwise' has no attribute 'scann'"):
        _ = headwise.scann
    with pytest.raises(AttributeError, match=r"module 'headwise\.ops' has no attribute 'nothing'"):
        _ = headwise.ops.nothing


def folder_with(tmp_path: Path, **sources: str) -> Path:
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    export_map.cache_clear()
    return tmp_path


def test_a_name_exported_twice_raises(tmp_path: Path):
    folder = folder_with(tmp_path, one='__all__ = ["shared"]', two='__all__ = ["shared"]')
    with pytest.raises(ValueError, match=r"'shared' is exported by a\.one and by a\.two; a name has one home"):
        export_map("a", folder)


def test_a_name_hidden_by_a_module_raises(tmp_path: Path):
    folder = folder_with(tmp_path, one='__all__ = ["two"]', two="__all__ = []")
    with pytest.raises(ValueError, match=r"'two', exported by a\.one, is also the name of a module"):
        export_map("a", folder)


def test_a_computed_list_raises(tmp_path: Path):
    folder = folder_with(tmp_path, one='__all__ = ["a"] + list("bc")')
    with pytest.raises(ValueError, match="__all__ is computed"):
        export_map("a", folder)


def test_private_modules_stay_private(tmp_path: Path):
    folder = folder_with(tmp_path, _hidden='__all__ = ["secret"]', shown='__all__ = ["open"]')
    assert export_map("a", folder) == {"open": "a.shown"}
    assert module_names(folder) == ["shown"]
    attribute, listing = area("a", [str(folder)])
    assert listing() == ["open", "shown"]
    assert attribute("__all__") == ["open"]


def test_a_top_name_that_is_a_module_raises(tmp_path: Path):
    folder = folder_with(tmp_path, api='__all__ = ["scan"]', scan="")
    attribute, _ = top_level("top", [str(folder)], api="api", also={}, always=[])
    with pytest.raises(ValueError, match=r"top\.api: scan is also a module of top"):
        attribute("scan_")


@pytest.mark.parametrize("name", AREAS)
def test_an_area_package_is_two_lines(name: str):
    tree = ast.parse((PACKAGE / name / "__init__.py").read_text())
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds == ["Expr", "ImportFrom", "Assign"], "an area is its docstring and the scan"
