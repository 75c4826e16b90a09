"""Edits by name: every edit class found, described, and made from text such as "zero-tuning:gamma=1.6"."""

import functools
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from headwise._lazy import module_names
from headwise.attend import groups
from headwise.attend.addresses import nearest
from headwise.attend.edit import Edit
from headwise.attend.groups import KeyGroup
from headwise.errors import InputError

__all__ = ["GROUPS", "describe_edits", "edit_classes", "import_name", "make_edit", "make_group", "split_edit"]

# How a key group is written, what it holds.
GROUPS = {
    "first": "the first token",
    "recent:N": "the last N tokens, counted again at every generated one",
    "spans:A-B[+C-D]": "tokens A to B of the prompt, both included, counted from 0 (the beginning-of-text token is 0)",
    "positions:A[+B]": "single positions",
    "tokens:ID[+ID]": "every place of the prompt that holds one of these tokens; ids, or words",
    "image": "the image tokens of the prompt",
}


@functools.cache
def edit_classes() -> dict[str, type[Edit]]:
    """Kebab-case name -> class, for the primitive edits and the methods of `headwise.steering`."""
    import headwise.attend.edits as primitives

    modules = [primitives]
    folder = Path(__file__).parent / "steering"
    modules += [importlib.import_module(f"headwise.steering.{name}") for name in module_names(folder)]
    found: dict[str, type[Edit]] = {}
    for module in modules:
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, Edit) and value.__module__ == module.__name__:
                found[kebab(name)] = value
    return dict(sorted(found.items()))


def kebab(name: str) -> str:
    """ZeroTuning -> zero-tuning."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).replace("_", "-").lower()


def import_name(path: str, what: str) -> Any:
    """What "module:name" names, the working folder included. Raises InputError where there is none."""
    module_name, _, name = path.partition(":")
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise InputError(f"{what}: {module_name} needs the module {error.name}, which is not installed") from None
        raise InputError(f"{what}: there is no module {module_name!r} here; run in the folder that holds it") from None
    finally:
        sys.path.remove("")
    if not hasattr(module, name):
        raise InputError(f"{what}: module {module_name} has no {name!r}{nearest(name, vars(module))}")
    return getattr(module, name)


def split_edit(text: str) -> tuple[str, type[Edit], dict[str, str]]:
    """Name, class and options of "NAME[:key=value,...]". A comma ends a value only before another "key=".

    Raises InputError for an unknown edit or parameter, with the nearest name.
    """
    name, _, rest = text.partition(":")
    head, _, more = rest.partition(":")
    if rest and "=" not in head and re.fullmatch(r"\w+", head):  # module:Class[:key=value,...]
        cls = import_name(f"{name}:{head}", "edit")
        if not (isinstance(cls, type) and issubclass(cls, Edit)):
            raise InputError(f"edit: {name}:{head} is no edit; subclass one of the edits of headwise.attend")
        name, rest = f"{name}:{head}", more
    else:
        known = edit_classes()
        name = kebab(name)
        if name not in known:
            raise InputError(f"edit: {name!r} is unknown; there are {', '.join(known)}{nearest(name, known)}")
        cls = known[name]
    options: dict[str, str] = {}
    for part in re.split(r",(?=\s*[A-Za-z_][\w-]*=)", rest) if rest else []:
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not value.strip():
            raise InputError(f"edit: {part!r} in {text!r} cannot be read; write NAME:key=value,key=value")
        check_parameter(name, cls, key)
        options[key] = value.strip()
    return name, cls, options


def check_parameter(name: str, cls: type[Edit], key: str) -> None:
    """Raise InputError for a parameter that an edit does not have, with the nearest name."""
    known = parameters(cls)
    if key not in known:
        raise InputError(f"edit: {name} has no parameter {key!r}; it has {', '.join(known)}{nearest(key, known)}")


def parameters(cls: type[Edit]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters, those that all edits share last."""
    found = dict(inspect.signature(cls).parameters)
    return {**{k: v for k, v in found.items() if k not in ("heads", "when")}, **found}


def make_edit(text: str, defaults: dict[str, Any], tokenizer: Any = None) -> Edit:
    """The edit that a text describes. defaults: for parameters that it has and the text leaves out.

    Raises InputError for values of the wrong type and for missing parameters.
    """
    name, cls, options = split_edit(text)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {key: value for key, value in defaults.items() if key in parameters(cls)}
    values |= {
        key: convert(f"edit {name}: {key}", hints.get(key, str), value, tokenizer) for key, value in options.items()
    }
    missing = [k for k, p in parameters(cls).items() if p.default is inspect.Parameter.empty and k not in values]
    if missing:
        hint = {"group": "group=first"}.get(missing[0], f"{missing[0]}=...")
        raise InputError(f"edit: {name} needs {', '.join(missing)}; write {name}:{hint}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"edit: {error}") from None


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for inner in typing.get_args(hint) for part in _alternatives(inner)]
    return [hint]


def convert(where: str, hint: Any, text: str, tokenizer: Any = None) -> Any:
    """A value of an annotated type from text. Raises InputError where none of the types fits."""
    choices: list[str] = []
    wanted = []
    for kind in _alternatives(hint):
        origin = typing.get_origin(kind) or kind
        if origin is type(None):
            if text.lower() == "none":
                return None
        elif origin is Literal:
            choices += [str(value) for value in typing.get_args(kind)]
            for value in typing.get_args(kind):
                if text == str(value):
                    return value
        elif origin is KeyGroup:
            return make_group(text, tokenizer)
        elif origin is bool:
            if text.lower() in ("true", "yes", "1", "false", "no", "0"):
                return text.lower() in ("true", "yes", "1")
            wanted.append("true or false")
        elif origin in (int, float):
            try:
                return origin(text)
            except ValueError:
                wanted.append("a whole number" if origin is int else "a number")
        elif origin is slice:
            if re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
                return slice(*(int(end) if end else None for end in text.split(":")))
            wanted.append("a range such as 2:-1")
        elif origin is Callable:
            if re.fullmatch(r"[\w.]+:\w+", text):
                return import_name(text, where)
            wanted.append("module:function")
        elif origin is str:
            return text
        elif isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Tensor | Mapping):
            try:
                numbers = [float(part) for part in text.split("+")]
            except ValueError:
                wanted.append("numbers joined by +")
            else:
                return tuple(int(n) if n.is_integer() else n for n in numbers)
    if choices:
        wanted.insert(0, ", ".join(choices))
    if not wanted:
        raise InputError(f"{where} holds tensors or another run's outputs; it can be set from Python only")
    raise InputError(f"{where} is {text!r}; expected {' or '.join(dict.fromkeys(wanted))}{nearest(text, choices)}")


def make_group(text: str, tokenizer: Any = None) -> KeyGroup:
    """A key group from text: first, recent:4, spans:3-9+12-15, positions:0+4, tokens:17+the, image."""
    name, _, rest = text.partition(":")
    parts = [part for part in rest.split("+") if part]
    names = [form.partition(":")[0] for form in GROUPS]
    if name not in names:
        raise InputError(f"group: {text!r} is unknown; there are {', '.join(GROUPS)}{nearest(name, names)}")
    if bool(parts) != (name in ("recent", "spans", "positions", "tokens")):
        form = next(form for form in GROUPS if form.partition(":")[0] == name)
        raise InputError(f"group: {text!r} cannot be read; write {form}")
    try:
        if name == "recent":
            return groups.recent(int(rest))
        if name == "positions":
            return groups.positions([int(part) for part in parts])
        if name == "spans":
            ends = [(int(a), int(b or a)) for a, _, b in (part.partition("-") for part in parts)]
            return groups.spans([(start, last + 1) for start, last in ends])
        if name == "tokens":
            return groups.tokens(i for part in parts for i in _token_ids(part, tokenizer))
        return groups.key_group(name)
    except InputError:
        raise
    except ValueError as error:
        reason = "positions are whole numbers" if "invalid literal" in str(error) else str(error)
        raise InputError(f"group: {text!r} cannot be read ({reason}); write {', '.join(GROUPS)}") from None


def _token_ids(part: str, tokenizer: Any) -> list[int]:
    if part.isdecimal():
        return [int(part)]
    if tokenizer is None:
        raise InputError(f"group: {part!r} is no token id, and this model has no tokenizer to look it up")
    # A word in running text and at its start are different tokens to most tokenizers.
    forms = {tuple(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (part, f" {part}")}
    found = [form[0] for form in forms if len(form) == 1]
    if not found:
        raise InputError(f"group: {part!r} is several tokens to this tokenizer; name it by positions with spans:A-B")
    return found


def describe_edits() -> list[dict[str, Any]]:
    """What there is to choose from: name, what it does, parameters with their types and defaults."""
    described = []
    for name, cls in edit_classes().items():
        hints = typing.get_type_hints(cls)
        found = [
            {
                "name": key,
                "type": _readable(hints.get(key, object)),
                "default": None if parameter.default is inspect.Parameter.empty else _plain(parameter.default),
                "required": parameter.default is inspect.Parameter.empty,
            }
            for key, parameter in parameters(cls).items()
        ]
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        described.append({"name": name, "class": cls.__name__, "summary": summary, "parameters": found})
    return described


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _readable(hint: Any) -> str:
    """A type as a person would say it: choices by name, tensors and functions by their kind."""
    names = []
    for kind in _alternatives(hint):
        origin = typing.get_origin(kind) or kind
        if origin is Literal:
            names += [str(value) for value in typing.get_args(kind)]
        elif origin is type(None):
            names.append("none")
        elif origin is Callable:
            names.append("function")
        elif origin is KeyGroup:
            names.append("key group")
        elif origin is slice:
            names.append("range")
        elif origin is float:
            names.append("number")
        elif isinstance(origin, type):
            names.append(getattr(origin, "__name__", str(origin)).lower())
    return " | ".join(dict.fromkeys(names))
