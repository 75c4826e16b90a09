"""DiNAT checkpoints without NATTEN: transformers asks for two functions that no NATTEN release since 0.20 has.

    from headwise.models import provide_natten
    with provide_natten():
        model = DinatForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")
        model(pixel_values)

Nothing is changed until it is asked for, and leaving the block (or `handle.remove()`) puts everything back.
"""

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from headwise.attention.neighborhood import natten2dav, natten2dqkrpb, neighborhood_attention

__all__ = ["NattenProvision", "provide_natten"]

MODELING = "transformers.models.dinat.modeling_dinat"
FUNCTIONS = {"natten2dqkrpb": natten2dqkrpb, "natten2dav": natten2dav}

_lock = threading.RLock()
_users = 0
_before: dict[str, Any] = {}


class NattenProvision:
    """What `provide_natten` returns: a context, or `remove()` undoes it, once."""

    def __init__(self) -> None:
        self._open = True

    def remove(self) -> None:
        """Put transformers back as it was, when the last provision is removed."""
        global _users
        with _lock:
            if not self._open:
                return
            self._open = False
            _users -= 1
            if not _users:
                _restore()

    def __enter__(self) -> "NattenProvision":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def provide_natten() -> NattenProvision:
    """Let transformers' DiNAT classes run on headwise's neighbourhood attention, until it is removed.

    Replaces in transformers' DiNAT file: the two functions, its check that the natten package is installed, and the
    forward of its attention layer, which then calls `neighborhood_attention` (weights are made only for
    `output_attentions=True` and dropout in training). The last is needed for right results too: since its queries were
    put in the form `view(hidden_shape).transpose(1, 2)`, that forward hands over rows where heads are expected.
    Where a NATTEN release still has the two functions they are replaced as well. Counted: the last removal restores.
    """
    global _users
    with _lock:
        if not _users:
            _install()
        _users += 1
    return NattenProvision()


def _install() -> None:
    with _importable():
        module = importlib.import_module(MODELING)
    layer = module.NeighborhoodAttention
    _before.update({name: getattr(module, name) for name in (*FUNCTIONS, "requires_backends")})
    _before["forward"] = layer.forward
    required = module.requires_backends

    def requires_backends(owner: Any, backends: Any) -> None:
        left = [name for name in ([backends] if isinstance(backends, str) else backends) if name != "natten"]
        if left:
            required(owner, left)

    for name, function in {**FUNCTIONS, "requires_backends": requires_backends}.items():
        setattr(module, name, function)
    layer.forward = _forward


def _restore() -> None:
    module = importlib.import_module(MODELING)
    module.NeighborhoodAttention.forward = _before.pop("forward")
    for name in list(_before):
        setattr(module, name, _before.pop(name))


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """With a NATTEN from 0.20 on, importing the file fails on the names it asks for: lend them for the import."""
    if MODELING in sys.modules or importlib.util.find_spec("natten") is None:
        yield
        return
    natten: ModuleType = importlib.import_module("natten.functional")
    lent = [name for name in FUNCTIONS if not hasattr(natten, name)]
    for name in lent:
        setattr(natten, name, FUNCTIONS[name])
    try:
        yield
    finally:
        for name in lent:
            delattr(natten, name)


def _forward(self: nn.Module, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """The attention layer of DiNAT on `[b x y c]`: what the released checkpoints were trained with."""
    layer: Any = self
    size = layer.attention_head_size
    q, k, v = (project(hidden_states).unflatten(-1, (-1, size)) for project in (layer.query, layer.key, layer.value))
    if not output_attentions and not (self.training and layer.dropout.p):
        out = neighborhood_attention(q, k, v, layer.kernel_size, dilation=layer.dilation, bias=layer.rpb)
        assert isinstance(out, Tensor)
        return (out.flatten(-2),)
    q, k, v = (x.movedim(-2, 1) for x in (q * size**-0.5, k, v))
    weights = layer.dropout(natten2dqkrpb(q, k, layer.rpb, layer.kernel_size, layer.dilation).softmax(-1))
    out = natten2dav(weights, v, layer.kernel_size, layer.dilation).movedim(1, -2).flatten(-2)
    return (out, weights) if output_attentions else (out,)
