"""Swap the attention inside an existing model for one of headwise's mechanisms: `convert`.

A mechanism brings its converter in a file of its own, `models/convert_<mechanism>.py`, whose `CONVERTERS` maps the
names it is known by to functions `(model, layers, *, option=...) -> model`; nothing here lists them. A converter
changes nothing when it raises, refuses a model that it has converted already, and keeps the trained weights.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

__all__ = ["Converter", "chosen_layers", "convert", "converters", "replace_module"]

Converter = Callable[..., Any]
Model = TypeVar("Model")


def convert(model: Model, to: str, layers: Iterable[int] | None = None, **options: Any) -> Model:
    """Change the attention of a model into another mechanism, in place; the model is returned.

    to: the mechanism, as "mixture-of-head" (`converters` lists them). layers: which layers, by number; None is all.
    model: of transformers, of timm, of plain torch modules or headwise's own; agent takes diffusers' pipelines, too.
    options: the mechanism's own. Weights that the mechanism shares with the attention before stay as they are.
    Raises ValueError for an unknown mechanism, option or layer and for a model that is converted already,
    UnsupportedModel for a model that the mechanism cannot go into; nothing has changed then.

    >>> model = convert(model, to="mixture-of-head", active=0.75)  # doctest: +SKIP
    """
    known = converters()
    name = to.strip().lower().replace("_", "-")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"convert: to is {to!r}; {hint}there are {', '.join(sorted(known))}")
    converter = known[name]
    allowed = [p.name for p in inspect.signature(converter).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in allowed]:
        raise ValueError(f"convert: {unknown[0]!r} is no option of {name}; it has {', '.join(allowed) or 'none'}")
    return converter(model, layers, **options)


@cache
def converters() -> dict[str, Converter]:
    """Name of a mechanism -> its converter, from every `convert_*.py` beside this file.

    Raises ValueError where two files claim one name.
    """
    found: dict[str, Converter] = {}
    for path in sorted(Path(__file__).parent.glob("convert_*.py")):
        module = importlib.import_module(f"headwise.models.{path.stem}")
        for name, converter in module.CONVERTERS.items():
            if name in found:
                raise ValueError(f"converters: {name!r} is offered by {found[name].__module__} and {module.__name__}")
            found[name] = converter
    return found


def chosen_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    """The layers that a converter is to change, of `count`; None is all.

    Raises ValueError for any that are not there, and for none.
    """
    if layers is None:
        return list(range(count))
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"convert: layers are {chosen}; expected numbers from 0 to {count - 1}, at least one")
    return chosen


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place, or every place, of another one; it takes over its mode, device and dtype."""
    sample = next(old.parameters(), None)
    if sample is not None:
        new.to(device=sample.device, dtype=sample.dtype)
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
