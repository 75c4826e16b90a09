"""The projection that mixes the heads of an attention module, and the slice of it that belongs to each head.

Found by what the module's compiled code applies last, and checked by its width: heads times value width.
"""

import inspect
import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.errors import UnsupportedModel

__all__ = ["AttentionShape", "attention_shape", "head_writes", "output_projection", "projection_bias"]

# Attributes that hold a number of query heads, on the module or else on its config, in the order of trust.
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
CONFIG_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
VALUE_DIM = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")


class AttentionShape(NamedTuple):
    """Query heads, key heads and the width of one head's output."""

    heads: int
    kv_heads: int
    value_dim: int


def attention_shape(module: nn.Module) -> AttentionShape:
    """Heads, key heads and value width of an attention module, from its attributes, its config and its projections.

    Raises UnsupportedModel when they cannot be told.
    """
    heads = _first_int(module, QUERY_HEADS) or _first_int(getattr(module, "config", None), CONFIG_HEADS)
    if not heads:
        raise UnsupportedModel(
            f"{type(module).__name__}: the number of heads cannot be told from its attributes or its config; "
            "headwise looks for num_heads, num_attention_heads, n_heads and n_head"
        )
    groups = _first_int(module, ("num_key_value_groups",))
    kv_heads = _first_int(module, KEY_HEADS) or (heads // groups if groups else heads)
    value_dim = _first_int(module, VALUE_DIM)
    if not value_dim:
        projection = _projection_or_none(module)
        width = _features(projection)[0] if projection is not None else _hidden_size(module)
        value_dim = width // heads
    return AttentionShape(heads, kv_heads, value_dim)


def output_projection(module: nn.Module, model: nn.Module | None = None) -> nn.Module:
    """The linear map that mixes the heads of an attention module; its input is the heads' outputs side by side.

    model: needed where the map lives beside the attention module instead of inside it (BERT and its relatives).
    Raises UnsupportedModel when there is no such map or its width is not heads times value width.
    """
    shape = attention_shape(module)
    wanted = shape.heads * shape.value_dim
    projection = _projection_or_none(module)
    if projection is None and model is not None:
        projection = _projection_beside(module, model, wanted)
    if projection is None or _features(projection)[0] != wanted:
        came = "none was found" if projection is None else f"one of width {_features(projection)[0]} was found"
        raise UnsupportedModel(
            f"{type(module).__name__}: {came} where a projection from {shape.heads} heads of width {shape.value_dim} "
            f"({wanted} features) is expected"
            + ("; give the model too, the projection may live beside the module" if model is None else "")
        )
    return projection


def head_writes(projection: nn.Module, heads: int) -> Float[Tensor, "h e c"]:
    """The slice of an output projection that belongs to each head: head h writes ``z[..., h, :] @ head_writes[h]``.

    The projection's bias belongs to no head (`projection_bias`).
    """
    width = _features(projection)[0]
    weight = getattr(projection, "weight", None)
    if type(projection) is nn.Linear:
        matrix = projection.weight.T
    elif type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor):
        matrix = weight  # stored inputs first
    else:  # quantised, adapted, parallel: whatever it is, it is linear, so its action on a basis is its matrix
        basis = torch.eye(width, dtype=_compute_dtype(projection), device=_device(projection))
        # Its forward, not a call: hooks on it are for the model's runs.
        matrix = projection.forward(basis) - projection.forward(torch.zeros_like(basis[:1]))
    return matrix.reshape(heads, width // heads, -1)


def projection_bias(projection: nn.Module) -> Float[Tensor, " c"]:
    """What an output projection adds whatever the heads do; zeros when it has no bias."""
    zeros = torch.zeros(1, _features(projection)[0], dtype=_compute_dtype(projection), device=_device(projection))
    return projection.forward(zeros)[0]


def _first_int(owner: Any, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _hidden_size(module: nn.Module) -> int:
    for child in module.modules():
        if _features(child)[0]:
            return _features(child)[0]
    return 0


def _features(module: nn.Module | None) -> tuple[int, int]:
    """Input and output width of a linear map of any make; (0, 0) for anything else."""
    width, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(width, int) and isinstance(out, int):
        return width, out
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return 0, 0


def _projection_or_none(module: nn.Module) -> nn.Module | None:
    """The last linear child that the module's code names: what it applies after attention.

    None when that is one of the maps before attention, as where the projection lives beside the module.
    """
    children = dict(module.named_children())
    for cls in type(module).__mro__:
        forward = vars(cls).get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if forward is not None else None
        if code is None:
            continue
        linear = [name for name in code.co_names if name in children and _features(children[name])[0]]
        if linear and not _is_input_map(linear[-1]):
            return children[linear[-1]]
        return None
    return None


def _is_input_map(name: str) -> bool:
    """Names of the maps that make queries, keys and values (``q``, ``k_proj``, ``value``, ``qkv``, ``Wqkv``)."""
    return bool(re.fullmatch(r"(w?[qkv]{1,3}|query|key|value|query_key_value)(_proj|_lin|_linear)?", name.lower()))


def _projection_beside(module: nn.Module, model: nn.Module, width: int) -> nn.Module | None:
    """The first linear map of the right width registered after the module in the block that holds it."""
    path = next((path for path, other in model.named_modules() if other is module), "")
    if not path:
        return None
    block = model.get_submodule(path.rpartition(".")[0])
    passed = False
    for child in block.children():
        if passed:
            for part in child.modules():
                if _features(part)[0] == width:
                    return part
        passed = passed or child is module
    return None


def _compute_dtype(projection: nn.Module) -> torch.dtype:
    return next((p.dtype for p in projection.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _device(projection: nn.Module) -> torch.device:
    return next((p.device for p in projection.parameters()), torch.device("cpu"))
