"""A second forward of a model that is advanced layer by layer from within the first.

What a layer of the one forward does may then depend on that layer in the other, and on what was done to both before:
a dependence that two forwards one after the other cannot have. The second forward costs its own prompt twice, once to
see what the layers are called with, once to run them.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layer_paths, layout, unwrap
from headwise.hf.inputs import as_inputs, frugal, takes
from headwise.hf.steps import CACHE_NAMES

__all__ = ["Layerwise", "position_arguments"]

CACHES = (*CACHE_NAMES, "past_key_value")
Change = Callable[[Tensor], Tensor]


class Layerwise:
    """A forward of `model` on `inputs`, stopped before the first layer of its main tower.

    Nothing sees it: no probe, no edit and no recording. It has no cache and no gradient. Raises UnsupportedModel for a
    model whose layers do not stand in one list.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        inner = unwrap(model)
        tower = layout(inner).main.name
        self.layers: list[nn.Module] = [inner.get_submodule(path) for path in layer_paths(inner, tower)]
        self.modules = list(attention_modules(inner))
        self.next = 0
        self._calls: dict[int, tuple[tuple, dict]] = {}
        handles = [
            layer.register_forward_pre_hook(self._keep(index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            with torch.no_grad(), self._aside(_plainly):
                _unseen(lambda: inner(**as_inputs(inner, {**frugal(inner), **inputs})))
        finally:
            for handle in handles:
                handle.remove()
        if len(self._calls) != len(self.layers):
            raise UnsupportedModel(
                f"{type(inner).__name__}: its forward calls {len(self._calls)} of {len(self.layers)} layers in their "
                "list; a forward beside another one needs a plain stack of layers"
            )
        args, kwargs = self._calls[0]
        self.stream: Tensor = args[0] if args else kwargs["hidden_states"]

    def _keep(self, index: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
            # A cache was filled when the layers were called; they must not read it when they are run.
            self._calls[index] = (args, {k: None if k in CACHES else value for k, value in kwargs.items()})

        return keep

    def advance(self, layer: int, change: Change | None = None) -> None:
        """Run the layers up to this one, it included. change: from this layer's heads' outputs `[b t h e]`, before they
        are mixed, to those that go on; layers before it that were not run yet are left as they are.
        """
        if layer < self.next:
            raise RuntimeError(f"layer {layer} of the forward beside has run; layer {self.next} is the next")
        with torch.no_grad():
            while self.next <= layer:
                with self._aside(_plainly if self.next < layer or change is None else _changing(change)):
                    _unseen(lambda: self._run(self.next))
                self.next += 1

    @contextlib.contextmanager
    def _aside(self, function: Callable[..., Any]) -> Iterator[None]:
        """Attention calls go to `function`, also where nothing is attached to the model."""
        configs = {id(module.config): module.config for module in self.modules}.values()
        for config in configs:
            dispatch.switch(config)
        try:
            with dispatch.aside(function):
                yield
        finally:
            for config in configs:
                dispatch.restore(config)

    def _run(self, index: int) -> None:
        args, kwargs = self._calls[index]
        if args:
            out = self.layers[index](self.stream.to(args[0].device), *args[1:], **kwargs)
        else:
            out = self.layers[index](**{**kwargs, "hidden_states": self.stream.to(kwargs["hidden_states"].device)})
        self.stream = out[0] if isinstance(out, tuple) else out


def _unseen(run: Callable[[], Any]) -> None:
    """Run where transformers does not collect hidden states and attentions for the forward around."""
    contextvars.Context().run(run)


def _plainly(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return dispatch.previous_function(module)(module, *args, **kwargs)


def _changing(change: Change) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = _plainly(module, *args, **kwargs)
        return change(out), weights

    return attend


def position_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` that count real tokens, for a model to which padding on the left would otherwise be words.

    Empty for models that work out positions themselves (those whose pictures have positions in three directions).
    """
    inner = unwrap(model)
    if not takes(inner, "position_ids") or any(hasattr(part, "get_rope_index") for part in inner.modules()):
        return {}
    return {"position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)}
