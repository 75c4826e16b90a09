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
from headwise.hf.shares import is_sharded, whole

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
    weight = getattr(projection, "weight", None)
    if (
        projection is not None
        and any(is_sharded(parameter) for parameter in projection.parameters())
        and not _is_plain(projection, weight)
    ):
        raise UnsupportedModel(
            f"{type(module).__name__}: its output projection ({type(projection).__name__}) is adapted or quantised and "
            "spread over processes; merge the adapter, or load the model in one process"
        )
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

    The projection's bias belongs to no head (`projection_bias`). Of adapted and quantised projections this is what they
    do now: adapters that are switched on are in it, and weights are as their quantisation left them. Weights that wait
    elsewhere (``device_map`` with offloading) are fetched; those that are spread over processes are gathered, so every
    rank must call this.
    Raises UnsupportedModel for weights that cannot be had from here.
    """
    width = _features(projection)[0]
    weight = getattr(projection, "weight", None)
    if isinstance(weight, nn.Parameter | Tensor) and _is_plain(projection, weight):
        matrix = whole(weight)
        matrix = matrix if type(projection).__name__ == "Conv1D" else matrix.T  # Conv1D stores inputs first
    else:  # quantised, adapted, offloaded: whatever it is, it is linear, so its action on a basis is its matrix
        basis = torch.eye(width, dtype=_compute_dtype(projection), device=_device(projection))
        both = _act(projection, torch.cat([basis, torch.zeros_like(basis[:1])]))
        matrix = both[:-1] - both[-1]
    return matrix.reshape(heads, width // heads, -1)


def projection_bias(projection: nn.Module) -> Float[Tensor, " c"]:
    """What an output projection adds whatever the heads do; zeros when it has no bias."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if isinstance(weight, Tensor) and is_sharded(weight) and _is_plain(projection, weight):
        made = torch.zeros(_features(projection)[1], dtype=weight.dtype, device=weight.device)
        return made if bias is None else whole(bias)
    zeros = torch.zeros(1, _features(projection)[0], dtype=_compute_dtype(projection), device=_device(projection))
    return _act(projection, zeros)[0]


def _is_plain(projection: nn.Module, weight: Any) -> bool:
    """Whether the weight of a projection is its matrix as it stands, all of it or this rank's part."""
    named = type(projection) is nn.Linear or type(projection).__name__ == "Conv1D"
    dense = type(weight) in (nn.Parameter, Tensor) or is_sharded(weight)  # tensor subclasses hold quantised weights
    return named and dense and weight.is_floating_point() and not weight.is_meta


def _act(projection: nn.Module, x: Float[Tensor, "n w"]) -> Float[Tensor, "n c"]:
    """What a projection makes of rows, without its dropout and without the hooks that are for the model's own runs."""
    if not _is_at_hand(projection):
        raise UnsupportedModel(
            f"{type(projection).__name__}: its weights are on the meta device, offloaded by a module around it or "
            "never loaded; read it while the model runs (headwise.probe), or load it without offloading this layer"
        )
    modes = {module: module.training for module in projection.modules()}
    try:
        for module in modes:
            module.training = False
        # Its forward, not a call: hooks on it are for the model's runs. Accelerate's own are part of the forward.
        return projection.forward(x)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _is_at_hand(module: nn.Module, fetched: bool = False) -> bool:
    """Whether the parameters of a module are loaded, or will be by its own hooks once its forward runs.

    A product with a parameter on the meta device would be numbers that mean nothing, not an error.
    """
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate's
    fetching = [part for part in getattr(hook, "hooks", [hook]) if getattr(part, "offload", False)]
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
    if own and not (fetched or fetching):
        return False
    fetched = fetched or any(getattr(part, "place_submodules", False) for part in fetching)
    return all(_is_at_hand(child, fetched) for child in module.children())


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
    """Where a projection computes. Offloaded ones move what they are given, and may be given it anywhere."""
    return next((p.device for p in projection.parameters() if not p.is_meta), torch.device("cpu"))
