"""The one entry in transformers' attention interface, and the switch from and to a model's own implementation.

Registered once, under one name, when this module is imported. Nothing happens to a model until a session switches its
configs; a module that no session knows (two models may share a config) goes straight to its previous implementation.
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

__all__ = ["NAME", "offer", "previous_function", "previous_name", "restore", "seen", "switch"]

NAME = "headwise"

# What a row of a mechanism that is offered under a name of its own sees: (module, query, key, mask) -> boolean mask.
Seen = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
_offered: dict[str, Seen] = {}

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
    if name == "eager":
        kwargs.pop("allow_is_causal_skip", None)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


def offer(name: str, function: Callable[..., tuple[Tensor, None]], sees: Seen, *, masks: str = "sdpa") -> None:
    """Offer a mechanism as `attn_implementation=name`; probes and edits work on it as on any other implementation.

    function: as the attention interface calls it. sees: the boolean mask, broadcastable to `[b h t s]`, that ordinary
    softmax attention would need to give the same output. masks: the implementation whose mask function is used.
    """
    _offered[name] = sees
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks])


def seen(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """The mask under which a module really attends: its own, or that of the mechanism it was switched to."""
    sees = _offered.get(previous_name(module.config))
    return mask if sees is None else sees(module, query, key, mask)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
