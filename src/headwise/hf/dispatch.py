"""The one entry in transformers' attention interface, and the switch from and to a model's own implementation.

Registered once, under one name, when this module is imported. Nothing happens to a model until a session switches its
configs; a module that no session knows (two models may share a config) goes straight to its previous implementation.

Mechanisms that stand in for a trained model's attention use the same entry: `offer` gives one a name for
`attn_implementation=`, `assign` puts one in the place of a single module's attention. To a session it is then the
previous implementation. What only gates the heads of an ordinary softmax says so, and its weights stay within reach.
"""

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from headwise.errors import UnsupportedModel

__all__ = [
    "NAME",
    "Held",
    "Mechanism",
    "aside",
    "assign",
    "base_function",
    "base_name",
    "gates_of",
    "held",
    "hold",
    "is_aside",
    "mechanism_of",
    "offer",
    "previous_function",
    "previous_name",
    "restore",
    "seen",
    "switch",
    "unassign",
    "use",
    "was_switched",
    "without_rows",
]

NAME = "headwise"

# Called as transformers calls an attention function; returns outputs `[b t h e]` and weights or None.
Mechanism = Callable[..., tuple[Tensor, Tensor | None]]

LOCK = threading.RLock()

_local = threading.local()  # .aside: what takes this thread's calls while `aside` is open


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

# (module, query, key, mask) -> the boolean mask, broadcastable to `[b h t s]`, under which ordinary softmax attention
# gives what a mechanism gives.
Sees = Callable[[nn.Module, Tensor, Tensor, Any], Any]

# With the same arguments: factors `[b t h]` on the heads of the implementation beneath, or None for a plain layer.
Gates = Callable[..., Tensor | None]


@dataclass(frozen=True)
class _Offer:
    """A mechanism, what its rows see where it is ordinary attention under a mask, its gates where it is ordinary
    attention with gates, and whose masks it gets (None: the base's)."""

    mechanism: Mechanism
    sees: Sees | None
    gates: Gates | None
    masks: str | None


_offered: dict[str, _Offer] = {}

_bases: dict[int, str] = {}  # id(config) -> the implementation beneath a mechanism's name, while the config lives


@runtime_checkable
class Held(Protocol):
    """A layer of a cache that holds different keys for different heads, and so must attend itself."""

    def attend(self, function: Mechanism, module: nn.Module, query, key, value, mask, **options) -> tuple:
        """What `function`, the module's own, gives over what is held."""
        ...

    def expanded(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, shapes_only: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """Keys and values of all positions and the mask `[b h t s]` that hides what a head does not hold."""
        ...

    def settle(self, module: nn.Module, query: Tensor, mask: Any, **options) -> None:
        """Called once after each call of attention."""
        ...


# The fresh keys that a cache returned to a module -> the cache's layer, for the call of attention that follows.
_held = WeakIdKeyDictionary()

# id(module) -> the module, kept alive, and what stands in for its attention.
_assigned: dict[int, tuple[nn.Module, Mechanism]] = {}


def offer(
    name: str,
    mechanism: Mechanism,
    sees: Sees | None = None,
    *,
    gates: Gates | None = None,
    masks: str | None = "sdpa",
) -> None:
    """Make `attn_implementation=name` mean a mechanism, for every model that asks for it.

    sees: for a mechanism that is ordinary attention under a mask of its own; probes and edits of weights then work.
    gates: for a mechanism that is the implementation beneath (`base_function`) with gates on its heads; edits of
    weights then work, and stay beneath the gates. masks: the implementation whose masks it gets, "sdpa" for boolean
    ones (True = may attend) or None; None for those of the implementation beneath. Raises ValueError for a name that is
    taken, or that transformers would take for something else ("/", "flash", "sdpa", "flex_attention", "paged|").
    """
    taken = name in ALL_ATTENTION_FUNCTIONS.valid_keys() and name not in _offered
    if taken or any(part in name for part in ("/", "flash", "sdpa", "flex_attention", "paged|", "eager")):
        raise ValueError(f"offer: {name!r} means something else to transformers; choose a name such as {NAME}-agent")
    _offered[name] = _Offer(mechanism, sees, gates, masks)
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def use(modules: Iterable[nn.Module], name: str, kept: Iterable[nn.Module] = ()) -> None:
    """Switch the configs of attention modules to an offered mechanism for good; the implementation that each had is the
    one beneath. kept: those of the modules that go on attending as before.

    Raises RuntimeError while probes, edits or an assigned mechanism are on a model with one of the configs.
    """
    with LOCK:
        modules, kept = list(modules), set(kept)
        configs: list[Any] = list({id(module.config): module.config for module in modules}.values())
        if any(id(config) in _switched for config in configs):
            raise RuntimeError("convert: probes or edits are attached to a model with this config; remove them first")
        for config in configs:
            if id(config) not in _bases:
                _bases[id(config)] = base_name(config)
                weakref.finalize(config, _bases.pop, id(config), None)
            config._attn_implementation_internal = name
        for module in modules:
            setattr(module, "keeps_attention", module in kept)  # noqa: B010, copies of the model have it, too


def was_switched(config: Any) -> bool:
    """Whether `use` switched this config, as against one that was loaded with a mechanism's name."""
    return id(config) in _bases


def base_name(config: Any) -> str:
    """The implementation that does the softmax: what the config had before any name of headwise's."""
    name = previous_name(config)
    return _bases.get(id(config), _own_choice(config)) if name in _offered else name


def base_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of `base_name`."""
    return _function(module, base_name(module.config))


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


def hold(key: Tensor, layer: Held) -> None:
    """Let the call of attention that receives these very keys attend to what a cache's layer holds."""
    _held[key] = layer


def held(key: Tensor) -> Held | None:
    """The cache's layer that returned these keys, once; None for the keys of ordinary caches."""
    return None if torch.compiler.is_compiling() or not _held else _held.pop(key, None)


def mechanism_of(module: nn.Module) -> Mechanism | None:
    """What stands in for a module's attention, None where its weights are those of a softmax over its keys."""
    if id(module) in _assigned:
        return _assigned[id(module)][1]
    offered = _offer_of(module)
    return None if offered is None else offered.mechanism


def _offer_of(module: nn.Module) -> _Offer | None:
    """The mechanism that a module's config names; None for a module that keeps its attention."""
    if id(module) in _assigned or getattr(module, "keeps_attention", False):
        return None
    return _offered.get(previous_name(module.config))


def gates_of(module: nn.Module) -> Gates | None:
    """What a module's mechanism gates the heads of ordinary attention with; None where it is no such mechanism."""
    offered = _offer_of(module)
    return None if offered is None else offered.gates


def without_rows(module: nn.Module) -> bool:
    """Whether a mechanism stands in for a module's attention whose heads have no rows of softmax weights."""
    if id(module) in _assigned:
        return True
    offered = _offer_of(module)
    return offered is not None and offered.gates is None and offered.sees is None


def seen(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """The mask under which a module really attends: its own, or that of the mechanism it was switched to."""
    offered = _offer_of(module)
    return mask if offered is None or offered.sees is None else offered.sees(module, query, key, mask)


@contextlib.contextmanager
def aside(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """While open, every attention call of this thread goes to `function(module, q, k, v, mask, **options)`.

    For a forward that something does beside the one that runs: probes, edits and recordings do not see it.
    """
    before = getattr(_local, "aside", None)
    _local.aside = function
    try:
        yield
    finally:
        _local.aside = before


def is_aside() -> bool:
    """Whether this thread is in a forward beside the one that runs."""
    return getattr(_local, "aside", None) is not None


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


def previous_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that a module would have called without headwise."""
    mechanism = mechanism_of(module)
    if mechanism is not None:
        return mechanism
    name = previous_name(module.config)
    if name not in _offered:
        return _function(module, name)
    return base_function(module) if _offered[name].masks is None else _kept


def _kept(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """A module that keeps its attention beside others with a mechanism that gets boolean masks, as it does then."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__}: its attention has {name}, so that no layer can be kept beside converted ones"
            )
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
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
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    handler = getattr(_local, "aside", None) or _handlers.get(id(module))
    if handler is not None:
        return handler(module, query, key, value, attention_mask, **options)
    layer, function = held(key), previous_function(module)
    if layer is None:
        return function(module, query, key, value, attention_mask, **options)
    out = layer.attend(function, module, query, key, value, attention_mask, **options)
    layer.settle(module, query, attention_mask, **options)
    return out


def _mask(*args, config: Any = None, **kwargs):
    name = previous_name(config) if config is not None else "sdpa"
    if name in _offered:
        name = _offered[name].masks or base_name(config)
    if name == "eager":
        kwargs.pop("allow_is_causal_skip", None)
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
