"""The attention of `SceneMagnifier`'s decoder: what takes the place of a layer's own while a scene is read.

A forward of the magnifier is a `Run`; modules of its decoder find it, select, and magnify what the layer before them
selected. A decoder that runs by itself is what it was.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headwise.attend.kernels import attention_with_lse
from headwise.attention.magnifier import fine_attention, region_preference
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout
from headwise.ops.regions import spread_to_fine

NAME = "headwise-scene-magnifier"
REFUSED = ("sliding_window", "s_aux", "position_bias", "cache", "read_index")

_thread = threading.local()  # .runs: forwards that are under way in this thread, the inner one last


@dataclass
class EncodedScene:
    """What of a scene depends on no question: coarse embeddings, fine keys and values of every magnifying layer.

    Keys `[b m n d]` are not rotated yet, since their positions depend on the prompt.
    """

    coarse: Float[Tensor, "b c d"]
    parent: Int[Tensor, "b n"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def take(self, items: Int[Tensor, " k"]) -> "EncodedScene":
        """The scenes with these numbers, as often as they are named: several questions about one scene."""
        return EncodedScene(
            self.coarse[items],
            self.parent[items],
            {layer: x[items] for layer, x in self.keys.items()},
            {layer: x[items] for layer, x in self.values.items()},
        )


@dataclass
class Held:
    """A scene in its place in a prompt: kept with the cache, so that generated tokens find it. keys are rotated."""

    columns: Int[Tensor, "b c"]
    parent: Int[Tensor, "b n"]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    scene: EncodedScene | None = None  # whose keys are still to be rotated, in the forward that reads the prompt


@dataclass
class Run:
    """One forward. rows: `[b t - first]`, which rows from `first` on are text that may look closer."""

    layers: dict[int, int]  # id of an attention module -> its layer
    held: Held
    rows: Bool[Tensor, "b r"]
    first: int
    past: int
    magnified: frozenset[int]
    alpha: float
    choose: Callable[[int, Tensor], Tensor]
    positions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    selected: Tensor | None = None  # `[b r c]`, by the layer before


def by_layer(decoder: nn.Module) -> dict[int, Any]:
    main = layout(decoder).main.name
    return {layer: module for module, (tower, layer) in attention_modules(decoder).items() if tower == main}


def involved(layers: Sequence[int]) -> list[int]:
    """Layers that magnify, and those before them, which select."""
    return sorted({layer - back for layer in layers for back in (0, 1)})


@contextmanager
def under_way(run: Run) -> Iterator[None]:
    stack = _thread.__dict__.setdefault("runs", [])
    stack.append(run)
    try:
        yield
    finally:
        stack.pop()


def _running(module: nn.Module) -> tuple[Run, int] | None:
    """The forward that a module takes part in, and its layer."""
    for run in reversed(getattr(_thread, "runs", [])):
        if id(module) in run.layers:
            return run, run.layers[id(module)]
    return None


def note_positions(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook: cosines and sines of the rows' positions are given to the module and not to its attention."""
    found = _running(module)
    if found is not None and kwargs.get("position_embeddings") is not None:
        found[0].positions[found[1]] = kwargs["position_embeddings"]


def _rotated(module: Any, run: Run, layer: int) -> Tensor:
    """Fine keys of a layer at the positions of their coarse tokens; made once for a prompt."""
    held = run.held
    if layer in held.keys:
        return held.keys[layer]
    assert held.scene is not None
    keys = held.scene.keys[layer]
    normed = [name for name, _ in module.named_children() if name in ("k_norm", "k_layernorm", "key_norm")]
    keys = getattr(module, normed[0])(keys) if normed else keys
    if layer in run.positions:
        cos, sin = run.positions[layer]
        rotate = getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)
        if rotate is None or cos.ndim != 3 or cos.shape[-1] != keys.shape[-1]:
            raise UnsupportedModel(
                f"SceneMagnifier: {type(module).__name__} rotates a part of its keys, or in a way of its own; decoders "
                "that rotate whole keys, as Llama does, or none are supported"
            )
        b = len(held.parent)
        at = (held.columns - run.past).gather(1, held.parent)[..., None].expand(-1, -1, cos.shape[-1])
        cos, sin = (x.expand(b, -1, -1).gather(1, at) for x in (cos, sin))
        keys = rotate(keys, keys, cos.to(keys.dtype), sin.to(keys.dtype))[1]
    elif getattr(module.config, "rope_parameters", None) is not None:
        raise UnsupportedModel(
            f"SceneMagnifier: {type(module).__name__} does not get its rotary positions from outside"
        )
    held.keys[layer] = keys
    return keys


def _attend(
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
    found = _running(module)
    if found is None:
        base = dispatch.base_function(module)
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    run, layer = found
    _refuse(module, dropout, kwargs)
    t = query.shape[2]
    is_causal = kwargs.get("is_causal")
    causal = (
        attention_mask is None
        and t > 1
        and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    )
    if causal and key.shape[2] > t:  # an empty static cache: the model attends to its first t columns
        key, value = key[:, :, :t], value[:, :, :t]
    options: dict[str, Any] = {"scale": scaling, "softcap": kwargs.get("softcap")}
    out, lse = attention_with_lse(query, key, value, mask=attention_mask, causal=causal, **options)
    first, b = run.first, len(query)
    fine_keys = _rotated(module, run, layer) if layer in run.magnified else None  # also where no text has come yet
    if first < t:
        text, text_lse = query[:, :, first:], lse[..., first:]
        if fine_keys is not None and run.selected is not None:
            held = run.held
            select = spread_to_fine(run.selected, held.parent)
            near = fine_attention(
                text, fine_keys, held.values[layer], select, out[:, :, first:], text_lse, alpha=run.alpha, **options
            )
            out = torch.cat([out[:, :, :first], near], 2)
        run.selected = None
        if layer + 1 in run.magnified:
            columns = run.held.columns
            coarse = key.gather(2, columns[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
            mask = attention_mask
            if mask is not None:
                mask = mask.expand(b, -1, t, -1)[:, :, first:]
                mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
            preference = region_preference(text, coarse, text_lse, mask=mask, **options)
            run.selected = run.choose(layer, preference) & run.rows[..., None]
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"SceneMagnifier: attention dropout is {dropout}, which cannot act on merged keys; set attention_dropout "
            "of the decoder's config to 0"
        )
    given = next((name for name in REFUSED if kwargs.get(name) is not None), None)
    if given is not None:
        raise UnsupportedModel(
            f"SceneMagnifier: {type(module).__name__} attends with {given}, under which coarse keys may be out of "
            "reach or weights are no plain softmax; use a decoder with full attention"
        )


def _sees(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """For probes and edits: a decoder without a scene is what it was; with one its rows see more than its keys."""
    if _running(module) is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} looks at fine tokens that are not among its keys; probes and edits of weights "
            "work on the decoder without a scene"
        )
    return mask


dispatch.offer(NAME, _attend, sees=_sees, masks=None)
