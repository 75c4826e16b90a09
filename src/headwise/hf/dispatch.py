"""The one entry in transformers' attention interface, and the switch from and to a model's own implementation.

Registered once, under one name, when this module is imported. Nothing happens to a model until a session switches its
configs; a module that no session knows (two models may share a config) goes straight to its previous implementation.

Mechanisms that work inside a trained model are offered under thin names, "headwise-...", which go through the same
entry: their function gets the implementation beneath, which also makes the masks.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from headwise.errors import UnsupportedModel

__all__ = [
    "NAME",
    "Mechanism",
    "base_function",
    "base_name",
    "mechanism_of",
    "offer",
    "previous_function",
    "previous_name",
    "restore",
    "switch",
    "use_mechanism",
    "was_converted",
]

NAME = "headwise"

LOCK = threading.RLock()


@dataclass
class _Switched:
    """A config in use by sessions. It is kept alive here, so its id stays its own."""

    config: Any
    own: str  # what the config said, and says again afterwards
    previous: str  # the implementation that does the work: another one where the config said "headwise"
    users: int = 0


_switched: dict[int, _Switched] = {}


@dataclass(frozen=True)
class Mechanism:
    """A way to attend inside a trained model.

    attend: `(module, query, key, value, mask, *, scaling, dropout, ...)` as the interface calls it; `base_function` is
    what it may call. gates: with the same arguments, factors `[b t h]` that it puts on the heads of the implementation
    beneath; edits of weights change what is gated. None: it is no such factor, and its weights cannot be edited.
    """

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    gates: Callable[..., Tensor | None] | None = None


_mechanisms: dict[str, Mechanism] = {}

_bases: dict[int, str] = {}  # id(config) -> the implementation beneath a mechanism, while the config lives

# id(module) -> what handles its calls; the handler keeps the module alive.
_handlers: dict[int, Callable[..., tuple[Tensor, Tensor | None]]] = {}


def switch(config: Any) -> None:
    """Send the attention of every module with this config through headwise. Counted: restore as often."""
    with LOCK:
        entry = _switched.get(id(config))
        if entry is None:
            own = config._attn_implementation or "eager"
            entry = _switched[id(config)] = _Switched(config, own, previous_name(config))
            # The plain attribute: the property's setter would also reach into sub-configs.
            config._attn_implementation_internal = NAME
        entry.users += 1


def restore(config: Any) -> None:
    """Undo one `switch`; the last one gives the config its previous implementation back."""
    with LOCK:
        entry = _switched[id(config)]
        entry.users -= 1
        if entry.users:
            return
        del _switched[id(config)]
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = entry.own
        else:
            warnings.warn(
                f"the attention implementation was set to {config._attn_implementation!r} while headwise was active; "
                "it is left so",
                stacklevel=3,
            )


def previous_name(config: Any) -> str:
    """The implementation that a config had before headwise."""
    entry = _switched.get(id(config))
    if entry is not None:
        return entry.previous
    if config._attn_implementation != NAME:
        return config._attn_implementation or "eager"
    return _own_choice(config)


def _own_choice(config: Any) -> str:
    """What the model's class would have chosen by itself: for configs loaded with a name of headwise's."""
    cls = MODEL_MAPPING.get(type(config), None)
    return "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"


def offer(name: str, mechanism: Mechanism) -> str:
    """Make a mechanism available as `attn_implementation="headwise-<name>"`, and return that name."""
    full = f"{NAME}-{name}"
    _mechanisms[full] = mechanism
    AttentionInterface.register(full, _attention)
    AttentionMaskInterface.register(full, _mask)
    return full


def use_mechanism(config: Any, full: str | None) -> None:
    """Switch a config to a mechanism for good, or with None back to the implementation beneath.

    Raises RuntimeError while edits or probes are attached to a model with this config.
    """
    with LOCK:
        if id(config) in _switched:
            raise RuntimeError("convert: probes or edits are attached to a model with this config; remove them first")
        base = base_name(config)
        if full is not None and id(config) not in _bases:
            _bases[id(config)] = base
            weakref.finalize(config, _bases.pop, id(config), None)
        config._attn_implementation_internal = base if full is None else full


def mechanism_of(config: Any) -> Mechanism | None:
    """The mechanism that a config was switched to or loaded with, beneath a session where there is one."""
    return _mechanisms.get(previous_name(config))


def was_converted(config: Any) -> bool:
    """Whether `use_mechanism` switched this config, as against a config loaded with a mechanism's name."""
    return id(config) in _bases


def base_name(config: Any) -> str:
    """The implementation that does the softmax: what the config had before any name of headwise's."""
    name = previous_name(config)
    return _bases.get(id(config), _own_choice(config)) if name in _mechanisms else name


def base_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of `base_name`."""
    return _function(module, base_name(module.config))


def previous_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would have called without headwise."""
    return _function(module, previous_name(module.config))


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name in _mechanisms:
        return _mechanisms[name].attend
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModel(
        f"{type(module).__name__}: its file has no eager_attention_forward; load the model with "
        'attn_implementation="sdpa" if its class supports it'
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    handler = _handlers.get(id(module))
    if handler is None:
        handler = previous_function(module)
    return handler(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _mask(*args, config: Any = None, **kwargs):
    name = base_name(config) if config is not None else "sdpa"
    if name == "eager":
        kwargs.pop("allow_is_causal_skip", None)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
