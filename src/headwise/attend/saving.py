"""Edits as JSON: what was found once can be used again, by another process or another person."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from headwise.attend import edits as primitives
from headwise.attend.addresses import Head
from headwise.attend.edit import Edit
from headwise.attend.groups import KeyGroup, key_group

__all__ = ["load_edits", "save_edits"]

NUMBERS = ("layers", "sink_dims")  # fields that hold a few whole numbers, not a tensor


def _encode(name: str, value: object) -> object:
    """One field of an edit as JSON. Raises ValueError for what cannot be written down (functions, other runs)."""
    if isinstance(value, KeyGroup):
        return value.to_json()
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        return {str(key): _encode(name, item) for key, item in value.items()}
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Iterable):
        return [_encode(name, item) for item in value]
    raise ValueError(f"save_edits: {name} is {type(value).__name__}, which JSON cannot hold")


def _decode(name: str, value: object) -> object:
    if isinstance(value, dict) and "name" in value:
        return key_group(value["name"], **{key: _frozen(item) for key, item in value.items() if key != "name"})
    if isinstance(value, dict) and "slice" in value:
        return slice(*value["slice"])
    if value in ("inf", "-inf"):
        return float(str(value))
    if isinstance(value, dict):
        return {Head.parse(head): _decode("", item) for head, item in value.items()}
    if isinstance(value, list) and name in NUMBERS:
        return tuple(value)
    if name != "heads" and isinstance(value, list):
        return torch.tensor(value)
    return value


def _frozen(value: object) -> object:
    """Lists as the tuples that they were."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _document(edit: Edit) -> dict:
    values = {f.name: _encode(f.name, getattr(edit, f.name)) for f in fields(edit)}
    return {"edit": type(edit).__name__, **values}


def save_edits(edits: Iterable[Edit], path: str) -> None:
    """Write edits as JSON. Raises ValueError for edits that hold functions or another run's outputs."""
    text = json.dumps({"schema": 1, "edits": [_document(edit) for edit in edits]}, indent=2)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def load_edits(path: str, known: dict[str, Callable[..., Edit]] | None = None) -> list[Edit]:
    """Read edits written by `save_edits`. known: further classes by name (methods of `headwise.steering`)."""
    classes: dict[str, Callable[..., Edit]] = {name: getattr(primitives, name) for name in primitives.__all__}
    classes |= known or {}
    with open(path, encoding="utf-8") as file:
        document = json.load(file)
    edits = []
    for entry in document["edits"]:
        name = entry.pop("edit")
        if name not in classes:
            raise ValueError(f"load_edits: edit {name!r} is unknown; known are {', '.join(sorted(classes))}")
        options: dict[str, Any] = {key: _decode(key, value) for key, value in entry.items()}
        edits.append(classes[name](**options))
    return edits
