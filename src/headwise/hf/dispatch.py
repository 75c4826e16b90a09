"""The one entry in transformers' attention interface, and the switch from and to a model's own implementation.

Registered once, under one name, when this module is imported. Nothing happens to a model until a session switches its
configs; a module that no session knows (two models may share a config) goes straight to its previous implementation.

Mechanisms that stand in for a trained model's attention use the same entry: `offer` gives one a name for
`attn_implementation=`, `assign` puts one in the place of a single module's attention. To a session it is then the
previous implementation.
"""

import sys
import threading
import warnings
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
    "assign",
    "mechanism_of",
    "offer",
    "previous_function",
    "previous_name",
    "restore",
    "switch",
    "unassign",
]

NAME = "headwise"

# Called as transformers calls an attention function; returns outputs `[b t h e]` and weights or None.
Mechanism = Callable[..., tuple[Tensor, Tensor | None]]

LOCK = threading.RLock()


@dataclass
class _Switched:
    """A config in use by sessions. It is kept alive here, so its id stays its own."""

    config: Any
    own: str  # what the config said, and says again afterwards
    previous: str  # the implementation that does the work: another one where the config said "headwise"
    users: int = 0


_switched: dict[int, _Switched] = {}

# id(module) -> what handles its calls; the handler keeps the module alive.
_handlers: dict[int, Callable[..., tuple[Tensor, Tensor | None]]] = {}

_offered: dict[str, Mechanism] = {}

# id(module) -> the module, kept alive, and what stands in for its attention.
_assigned: dict[int, tuple[nn.Module, Mechanism]] = {}


def offer(name: str, mechanism: Mechanism) -> None:
    """Make `attn_implementation=name` mean a mechanism, for every model that asks for it.

    The mechanism gets boolean masks (True = may attend) or None. Raises ValueError for a name that is taken, or that
    transformers would take for something else ("/", "flash", "sdpa", "flex_attention", "paged|").
    """
    taken = name in ALL_ATTENTION_FUNCTIONS.valid_keys() and name not in _offered
    if taken or any(part in name for part in ("/", "flash", "sdpa", "flex_attention", "paged|", "eager")):
        raise ValueError(f"offer: {name!r} means something else to transformers; choose a name such as {NAME}-agent")
    _offered[name] = mechanism
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def assign(module: nn.Module, mechanism: Mechanism) -> None:
    """Let a mechanism stand in for one module's attention until `unassign`. It gets the masks of the implementation
    that the model has. Raises RuntimeError where another one stands there."""
    with LOCK:
        if id(module) in _assigned:
            raise RuntimeError(f"{type(module).__name__}: a mechanism stands in for its attention already; remove it")
        switch(module.config)
        _assigned[id(module)] = (module, mechanism)


def unassign(module: nn.Module) -> None:
    """Undo `assign`."""
    with LOCK:
        del _assigned[id(module)]
        restore(module.config)


def mechanism_of(module: nn.Module) -> Mechanism | None:
    """What stands in for a module's attention, None where its weights are those of a softmax over its keys."""
    if id(module) in _assigned:
        return _assigned[id(module)][1]
    return _offered.get(previous_name(module.config))


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
    # Loaded with attn_implementation="headwise": what the class would have chosen by itself.
    cls = MODEL_MAPPING.get(type(config), None)
    return "sdpa" if getattr(cls, "_supports_sdpa", True) else "eager"


def previous_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would have called without headwise."""
    mechanism = mechanism_of(module)
    if mechanism is not None:
        return mechanism
    name = previous_name(module.config)
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
    name = previous_name(config) if config is not None else "sdpa"
    name = "sdpa" if name in _offered else name
    if name == "eager":
        kwargs.pop("allow_is_causal_skip", None)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
