"""Forward hooks that read or change one tensor on its way through a module."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.hf._residual import Place
from headwise.hf.dispatch import is_aside
from headwise.hf.shares import HeadShare

__all__ = ["Spot", "fitting", "hook", "joined", "split"]


@dataclass(frozen=True)
class Spot:
    """A site resolved to a hook: the module, which argument or output element, its factor, and heads to split into."""

    module: nn.Module
    place: Place
    factor: float = 1.0
    heads: int = 0
    stream: "Spot | None" = None
    """Where to see the shape that batch and tokens have, for a tensor in which they are one axis."""
    width: int = 0
    """Features of all heads together, where there are heads to split into."""
    share: HeadShare | None = None
    """How the heads may be shared among processes; what is read is then gathered, and of what is put the own part."""


def split(value: Tensor, spot: Spot) -> Tensor:
    if not spot.heads:
        return value
    if _is_shared(value, spot):
        assert spot.share is not None
        value = spot.share.gather(value, -1)
    return value.unflatten(-1, (spot.heads, -1))


def joined(value: Tensor, old: Tensor, spot: Spot) -> Tensor:
    """Undo `split`: the shape that the model had, and of heads that processes share the part of this one."""
    if spot.heads and _is_shared(old, spot):
        assert spot.share is not None
        value = spot.share.own(value, -2)
    return value.reshape(old.shape)


def _is_shared(value: Tensor, spot: Spot) -> bool:
    return spot.share is not None and spot.share.applies(value.shape[-1], spot.width, type(spot.module).__name__)


def fitting(value: Any, before: Tensor, site: object) -> Tensor:
    if value is before:
        return before
    if not isinstance(value, Tensor):
        if not isinstance(value, int | float):
            raise TypeError(
                f"{site}: the replacement is a {type(value).__name__}; expected a tensor, number or function"
            )
        return torch.full_like(before, value)
    try:
        return value.to(before).expand(before.shape)
    except RuntimeError:
        raise ValueError(
            f"{site}: the replacement has shape {tuple(value.shape)}; it must fit {tuple(before.shape)}"
        ) from None


def hook(spot: Spot, act: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
    """Hang `act` on a spot: it gets the tensor there, and what it returns (if anything) goes in its place.

    Returns what takes it down again.
    """
    if spot.stream is not None:
        shapes: list[torch.Size] = []

        def see(stream: Tensor) -> None:
            shapes[:] = [stream.shape]

        def unflattened(flat: Tensor) -> Tensor | None:
            made = act(flat.reshape(shapes[0]))
            return None if made is None else made.reshape(flat.shape)

        handles = [_register(spot.stream, see), _register(spot, unflattened)]
    else:
        handles = [_register(spot, act)]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _register(spot: Spot, act: Callable[[Tensor], Tensor | None]) -> Any:
    if spot.place.argument is not None:
        return spot.module.register_forward_pre_hook(partial(_before, spot.place.argument, act), with_kwargs=True)
    return spot.module.register_forward_hook(partial(_after, spot.place.element, act))


def _before(
    key: int | str, act: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    if is_aside():
        return None
    if isinstance(key, int) and key >= len(args):  # given by keyword this time
        key = list(inspect.signature(type(module).forward).parameters)[key + 1]
    made = act(args[key] if isinstance(key, int) else kwargs[key])
    if made is None:
        return None
    if isinstance(key, int):
        return (*args[:key], made, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: made}


def _after(
    element: int | None, act: Callable[[Tensor], Tensor | None], module: nn.Module, args: tuple, output: Any
) -> Any:
    del module, args
    if is_aside():
        return None
    if isinstance(output, Tensor):
        return act(output)
    if hasattr(output, "logits"):
        made = act(output.logits)
        if made is not None:
            output.logits = made
        return None if made is None else output
    index = element or 0
    made = act(output[index])
    if made is None:
        return None
    return type(output)((*output[:index], made, *output[index + 1 :]))
