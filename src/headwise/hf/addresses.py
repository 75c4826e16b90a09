"""Where the heads of a transformers model are: attention modules, towers, layers and their paths.

An attention module is one whose class looks up ``ALL_ATTENTION_FUNCTIONS`` when it runs; that is read off its compiled
code, so no list of architectures is kept. Modules are told apart by identity, never by ``layer_idx``, which is missing,
None or ambiguous in many families.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from headwise.attend.addresses import Head, Layout, Tower
from headwise.attend.point import head_points, point_layout
from headwise.errors import UnsupportedModel
from headwise.hf.projections import attention_shape
from headwise.hf.projections import head_writes as head_writes
from headwise.hf.projections import output_projection as output_projection

__all__ = [
    "HeadRecord",
    "attention_modules",
    "heads_of",
    "layer_paths",
    "layout",
    "tower_kinds",
    "unwrap",
]

TowerKind = Literal["causal", "bidirectional", "cross"]

CROSS = re.compile(r"cross|enc_?dec|encoder_(decoder_)?att", re.IGNORECASE)
CAUSAL_MASKS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"}
OTHER_MASKS = {"create_bidirectional_mask", "create_bidirectional_sliding_window_mask"}
# The text decoder comes before what feeds it; anything else follows in the order of the model.
TOWER_ORDER = ("", "decoder", "text", "encoder", "cross")


@dataclass(frozen=True)
class HeadRecord:
    """One head and the module it belongs to."""

    head: Head
    module: nn.Module
    path: str


class _Found(NamedTuple):
    module: nn.Module
    path: str
    tower: str
    layer: int
    layers: int
    holder: str | None


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside compiled, data-parallel and PEFT wrappers.

    Raises UnsupportedModel when there is none, or when it only wraps a network of another library.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.Module) and isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif isinstance(inner, nn.Module) and callable(getattr(inner, "get_base_model", None)):
            inner = getattr(inner, "get_base_model")()  # noqa: B009, PEFT is not installed for everybody
        else:
            raise UnsupportedModel(
                f"model: {type(inner).__name__} is not a transformers model; headwise reaches attention through "
                "transformers' attention interface, load the network with a transformers class such as "
                "AutoModelForCausalLM, ViTModel or Dinov2Model"
            )
    return inner


def attention_modules(model: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """Every attention module -> (tower, layer), in the order of the model.

    Raises UnsupportedModel when the model does not go through transformers' attention interface.
    """
    return {found.module: (found.tower, found.layer) for found in _find(model)}


def layout(model: nn.Module) -> Layout:
    """Query and key heads per layer of every tower, main tower first. Layers without attention have 0 heads.

    In a network of headwise's own mechanisms the layers are its `attend.HeadPoint`s.
    """
    if points := head_points(model):
        return point_layout(points)
    towers: dict[str, list[_Found]] = {}
    for found in _find(model):
        towers.setdefault(found.tower, []).append(found)
    order = sorted(towers, key=lambda name: TOWER_ORDER.index(name) if name in TOWER_ORDER else len(TOWER_ORDER))
    made = []
    for name in order:
        heads, keys = [0] * towers[name][0].layers, [0] * towers[name][0].layers
        for found in towers[name]:
            shape = attention_shape(found.module)
            heads[found.layer], keys[found.layer] = shape.heads, shape.kv_heads
        made.append(Tower(name, tuple(heads), tuple(keys)))
    return Layout(tuple(made))


def heads_of(model: nn.Module) -> list[HeadRecord]:
    """Every head of every tower with the path of its module, main tower first.

    >>> [f"{record.head} {record.path}" for record in heads_of(model)][0]  # doctest: +SKIP
    '0.0 model.layers.0.self_attn'
    """
    places = {(found.tower, found.layer): found for found in _find(model)}
    return [
        HeadRecord(head, places[head.tower, head.layer].module, places[head.tower, head.layer].path)
        for head in layout(model).heads("*")
    ]


def tower_kinds(model: nn.Module) -> dict[str, TowerKind]:
    """Tower -> whether its rows see only the past ("causal"), everything, or another sequence ("cross")."""
    if points := head_points(model):
        flags = [getattr(owner, "is_causal", False) for owner in model.modules() if set(owner.children()) & set(points)]
        causal = any(all(flag) if isinstance(flag, tuple) else flag for flag in flags)
        return {"": "causal" if causal else "bidirectional"}
    inner = unwrap(model)
    kinds: dict[str, TowerKind] = {}
    every = _find(inner)
    for found in every:
        if found.tower in kinds:
            continue
        if _is_cross(found.path, found.module):
            kinds[found.tower] = "cross"
        else:
            others = {other.module for other in every if other.tower not in (found.tower, "cross")}
            kinds[found.tower] = "causal" if _is_causal(inner, found, others) else "bidirectional"
    return kinds


def layer_paths(model: nn.Module, tower: str) -> list[str]:
    """Paths of the layers of a tower, in order.

    Raises UnsupportedModel when its layers do not stand in one list.
    """
    found = next((found for found in _find(model) if found.tower == tower), None)
    if found is None:
        names = [name or "the unnamed main tower" for name in tower_kinds(model)]
        raise ValueError(f"tower: {tower!r} is none of this model's; it has {', '.join(names)}")
    if found.holder is None:
        raise UnsupportedModel(
            f"{type(unwrap(model)).__name__}: the layers of tower {tower!r} do not stand in one list, one attention "
            "module each; sites need a plain stack of layers"
        )
    return [f"{found.holder}.{layer}" for layer in range(found.layers)]


# --- finding --------------------------------------------------------------------------------------------------------


@cache
def _uses_interface(cls: type) -> bool:
    """Whether a method of the class, as it is compiled, looks up the attention interface."""
    for name in dir(cls):
        function = inspect.unwrap(getattr(cls, name)) if callable(getattr(cls, name, None)) else None
        code = getattr(function, "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and "get_interface" in code.co_names:
            return True
    return False


def _find(model: nn.Module) -> list[_Found]:
    inner = unwrap(model)
    paths = [(path, module) for path, module in inner.named_modules() if _dispatches(module)]
    if not paths:
        raise UnsupportedModel(_refusal(inner))
    for path, _ in paths:
        for owner in _owners(inner, path):
            if not type(owner)._can_set_attn_implementation():
                raise UnsupportedModel(_refusal(owner))
    names = [_tower_name(inner, path, module) for path, module in paths]
    if len(set(names)) == 1:
        names = [""] * len(names)
    found = []
    for tower in dict.fromkeys(names):
        members = [place for place, name in zip(paths, names, strict=True) if name == tower]
        numbers, layers, holder = _number([path for path, _ in members], inner)
        found += [
            _Found(module, path, tower, layer, layers, holder)
            for (path, module), layer in zip(members, numbers, strict=True)
        ]
    position = {id(module): index for index, (_, module) in enumerate(paths)}
    return sorted(found, key=lambda item: position[id(item.module)])


def _dispatches(module: nn.Module) -> bool:
    return not isinstance(module, PreTrainedModel) and _uses_interface(type(module))


def _refusal(model: PreTrainedModel) -> str:
    name = type(model).__name__
    if "timm" in type(model).__module__.lower() or any(
        type(part).__module__.split(".")[0] == "timm" for part in model.modules()
    ):
        return (
            f"model: {name} holds a timm network, which does not go through transformers' attention interface; "
            "load the same weights with a transformers class such as ViTModel or Dinov2Model"
        )
    return (
        f"model: {name} does not go through transformers' attention interface, so its heads can be neither read nor "
        "edited; use a class that does (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, OPT, BERT, T5, ViT, CLIP, ...), "
        "or a newer transformers release in which it does"
    )


def _owners(model: PreTrainedModel, path: str) -> Iterator[PreTrainedModel]:
    """The transformers models around a module, innermost first."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        if isinstance(owner, PreTrainedModel):
            yield owner


def _subconfigs(config: Any, role: str = "") -> Iterator[tuple[Any, str]]:
    """Configs of parts of a model with the role that their key names, innermost first."""
    for key in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, key, None)
        if part is not None and part is not config:
            name = _role(key) if role in ("", "text") else role
            yield from _subconfigs(part, name)
            yield part, name


def _role(key: str) -> str:
    key = key.removesuffix("_config").removesuffix("config").strip("_").lower()
    for role, marks in {
        "vision": ("vision", "visual", "image", "vit"),
        "audio": ("audio", "speech"),
        "text": ("text", "llm", "language", "thinker", "lm"),
    }.items():
        if any(mark in key for mark in marks):
            return role
    return re.sub(r"[^a-z0-9-]+", "-", key) or "text"


def _tower_name(model: PreTrainedModel, path: str, module: nn.Module) -> str:
    roles = {id(config): role for config, role in _subconfigs(model.config)}
    configs = [getattr(module, "config", None), *(owner.config for owner in _owners(model, path))]
    role = next((roles[id(config)] for config in configs if id(config) in roles), "")
    if role and role not in ("text", "encoder", "decoder"):
        return role
    if _is_cross(path, module):
        return "cross"
    side = role if role in ("encoder", "decoder") else _side(model, path)
    if side:
        return side
    if role == "text" and not _is_main_text(model, module):
        return "text"
    return ""


def _side(model: PreTrainedModel, path: str) -> str:
    """Encoder or decoder of an encoder-decoder, by the part of the model that holds the module."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return ""
    sides = [part for part in path.split(".") if part in ("encoder", "decoder")]
    return sides[0] if sides else ""


def _is_main_text(model: PreTrainedModel, module: nn.Module) -> bool:
    """The text tower of a model that writes text, as against that of a model that compares pictures and captions."""
    return type(model).can_generate() or getattr(module, "is_causal", False) is True


def _is_cross(path: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", None) is True:
        return True
    return bool(CROSS.search(path.rsplit(".", 1)[-1]) or re.search("Cross", type(module).__name__))


def _is_causal(model: PreTrainedModel, found: _Found, others: set[nn.Module]) -> bool:
    """others: the modules of other towers; what is built around those too says nothing of this one."""
    if getattr(found.module, "is_causal", False) is True:
        return True
    for owner in _owners(model, found.path):  # CLIP's text tower says so only in the mask that it builds
        if any(part in others for part in owner.modules()):
            return False
        code = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
        masks = set(code.co_names if code else ()) & (CAUSAL_MASKS | OTHER_MASKS)
        if masks & CAUSAL_MASKS and masks & OTHER_MASKS:  # the other mask may be that of an encoder
            return found.tower == "decoder" or getattr(owner.config, "is_decoder", False) is True
        if masks:
            return masks <= CAUSAL_MASKS
    return False


def _number(paths: list[str], model: PreTrainedModel) -> tuple[list[int], int, str | None]:
    """Layer of each module of a tower, the number of layers, and the path of the list that holds them.

    The layer is the index in the outermost list that holds all modules of the tower, one to an entry, so that hybrid
    models count the layers without attention; where there is no such list it is the order.
    """
    lists = [_list_indices(path, model) for path in paths]
    for holder in lists[0]:
        if all(holder in entry for entry in lists):
            numbers = [entry[holder] for entry in lists]
            if len(set(numbers)) == len(numbers):
                container: Any = model.get_submodule(holder)
                return numbers, len(container), holder
    return list(range(len(paths))), len(paths), None


def _list_indices(path: str, model: PreTrainedModel) -> dict[str, int]:
    """Path of every module list around a module -> the module's index in it, outermost first."""
    parts = path.split(".")
    return {
        ".".join(parts[:end]): int(parts[end])
        for end in range(len(parts))
        if parts[end].isdigit() and isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList)
    }
