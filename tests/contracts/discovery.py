"""The objects of an area, found by what it exports, and an instance of each made from its signature.

A new class is checked because it is exported; nothing here lists classes. Arguments are chosen by the name or the type
of a parameter. A class whose parameters say nothing here may have a static method ``example()`` that makes one.
"""

import importlib
import inspect
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

import headwise
from headwise._lazy import export_map
from headwise.attend.addresses import Head
from headwise.attend.groups import KeyGroup, first_token

# Small values for the parameters that mechanisms, memories, slots and models share (the names of style.md section 5).
SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "hidden_size": 32,
    "dim": 32,
    "channels": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "window_size": 3,
    "kernel_size": 3,
    "chunk_size": 4,
    "block_size": 4,
    "pos_dim": 16,
    "num_agents": 3,
    "num_slots": 3,
    "num_layers": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "num_classes": 5,
    "num_labels": 5,
    "iterations": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 16,
    "grid_size": (4, 4),
}


def exported(area: str, base: type, *, abstract: tuple[type, ...] = ()) -> list[type]:
    """Classes that an area exports and that derive from ``base``, without base and ``abstract`` themselves."""
    folder = Path(headwise.__file__).parent / area
    found = []
    for name, owner in sorted(export_map(f"headwise.{area}", folder).items()):
        value = getattr(importlib.import_module(owner), name)
        if isinstance(value, type) and issubclass(value, base) and value is not base and value not in abstract:
            found.append(value)
    return found


def make(cls: type, **given: Any) -> Any:
    """An instance of a class from its own ``example`` or from small values for its required parameters."""
    if not given and callable(getattr(cls, "example", None)):
        return cls.example()
    chosen = dict(given)
    for name, parameter in inspect.signature(cls).parameters.items():
        needed = parameter.default is inspect.Parameter.empty
        if name in chosen or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in SMALL:
            chosen[name] = SMALL[name]
        elif needed:
            raise LookupError(
                f"{cls.__name__}: the contracts know no small value for {name!r}; add it to SMALL, or give the class a "
                "static method example()"
            )
    return cls(**chosen)


def variants(annotation: Any) -> list[Any]:
    """The members of a union or literal, in order; the annotation itself otherwise."""
    if get_origin(annotation) in (typing.Union, UnionType):
        return [one for part in get_args(annotation) for one in variants(part)]
    return [annotation]


def sharpen(weights: Tensor, rows: Any) -> Tensor:
    """Rows of squared weights, renormalised."""
    return weights.square() / weights.square().sum(-1, keepdim=True).clamp_min(1e-30)


def edit_arguments(cls: type, number: float, heads: Any, head_dim: int) -> dict[str, Any] | None:
    """Arguments of an edit: every number of it is ``number``. None where it asks for something not made up here."""
    if not is_dataclass(cls):
        return None
    hints = typing.get_type_hints(cls)
    chosen: dict[str, Any] = {"heads": heads}
    for item in fields(cls):
        if not item.init or item.name in chosen:
            continue
        required = item.default is MISSING and item.default_factory is MISSING
        kinds = variants(hints[item.name])
        if float in kinds:
            chosen[item.name] = number
        elif not required:
            continue
        elif KeyGroup in kinds:
            chosen[item.name] = first_token()
        elif any(get_origin(kind) is Literal for kind in kinds):
            chosen[item.name] = get_args(next(kind for kind in kinds if get_origin(kind) is Literal))[0]
        elif item.name == "basis" and Tensor in kinds:
            basis = torch.linalg.qr(torch.randn(head_dim, 2, generator=torch.Generator().manual_seed(0))).Q
            chosen[item.name] = basis
        elif item.name == "function":
            chosen[item.name] = sharpen
        elif item.name == "delta":
            chosen[item.name] = torch.linspace(2, -2, 64)
        elif item.name == "values":
            chosen[item.name] = {Head.parse(h): torch.full((head_dim,), 0.25) for h in heads}
        else:
            return None
    return chosen
