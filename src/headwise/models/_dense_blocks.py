"""Dense attention that a converter can take out of a network: headwise's own, timm's and torch's.

timm's `Attention` and torch's `nn.MultiheadAttention` are known by their structure. While a converter works, each has
a `SoftmaxAttention` with its very parameters in its place; layers that the converter leaves alone keep it, and have
heads that can be read and edited. What a network calls its attention with is met by hooks.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.attend.point import head_points
from headwise.attention.softmax import SoftmaxAttention
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import attention_modules
from headwise.models.conversion import chosen_layers, replace_module

TIMM_ARGUMENTS = ("x", "attn_mask", "is_causal")
TORCH_ARGUMENTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


class Tokens(NamedTuple):
    """The grid of an image's tokens, and how many others (class, distillation, registers) come before them."""

    grid: tuple[int, ...]
    prefix: int

    @property
    def count(self) -> int:
        return math.prod(self.grid) + self.prefix


class Swapped(NamedTuple):
    """A new layer, and the options that a config has to remember to make it again."""

    module: nn.Module
    options: Mapping[str, Any]


@contextmanager
def adopted(model: Any) -> Iterator[None]:
    """Let `swap` find timm's and torch's attention, too; when the block raises, the network is what it was.

    Raises UnsupportedModel where one of them does more than `SoftmaxAttention` does.
    """
    taken: list[tuple[nn.Module, nn.Module]] = []
    if isinstance(model, nn.Module) and not _on_interface(model):
        found = [(path, part) for path, part in model.named_modules() if _is_fused(part) or _is_torchs(part)]
        if any(not path for path, _ in found):
            raise UnsupportedModel("convert: the model is one attention layer; give the network that holds it")
        made = [(part, _softmax(path, part)) for path, part in found]
        for old, new in made:
            replace_module(model, old, new)
            taken.append((old, new))
    try:
        yield
    except BaseException:
        for old, new in taken:
            replace_module(model, new, old)
        raise
    if any(_is_torchs(old) for old, _ in taken):
        for part in model.modules():
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False  # a path of its own around the attention's parameters


def swap(
    model: nn.Module,
    layers: Iterable[int] | None,
    name: str,
    make: Callable[[SoftmaxAttention, int], Swapped],
) -> None:
    """Put what `make(old, layer)` gives in the place of the chosen layers; projections are handed over as they are.

    name: of the mechanism, for messages. A config with `attention` and `attention_options` learns what was done.
    Raises UnsupportedModel for a network with other layers than `SoftmaxAttention` without dropout, ValueError for
    layers that it does not have; nothing has changed then.
    """
    dense = [part for part in model.modules() if isinstance(part, SoftmaxAttention)]
    points = head_points(model)
    if len(dense) != len(points) or any(part.dropout for part in dense):
        raise UnsupportedModel(
            f"convert: {type(model).__name__} has {len(points)} layers with heads, {len(dense)} of them "
            f"SoftmaxAttention; {name} goes into networks of SoftmaxAttention without dropout (or of timm's or torch's "
            "attention without it), or into transformers models"
        )
    if model in dense:
        raise UnsupportedModel("convert: the model is one attention layer; give the network that holds it")
    made = {layer: make(dense[layer], layer) for layer in chosen_layers(layers, len(dense))}
    for layer, (new, _) in made.items():
        old: Any = dense[layer]
        replace_module(model, old, new)
        setattr(new, "qkv", old.qkv)  # noqa: B010, a module of any mechanism
        setattr(new, "proj", old.proj)  # noqa: B010
        _answer(new, getattr(old, "called_as", None), getattr(old, "batch_first", True))
    _record(getattr(model, "config", None), made)


def _record(config: Any, made: Mapping[int, Swapped]) -> None:
    """Say it in the config of a network that is built from its config, so that it is saved and loaded as it is."""
    names = getattr(config, "attention", None)
    if names is None or not hasattr(config, "attention_options"):
        return
    count = config.num_hidden_layers
    names = [names] * count if isinstance(names, str) else list(names)
    options = config.attention_options
    options = list(options) if isinstance(options, list | tuple) else [options] * count
    for layer, (module, own) in made.items():
        allowed = inspect.signature(type(module)).parameters
        kept = {key: value for key, value in (options[layer] or {}).items() if key in allowed}
        names[layer], options[layer] = type(module).__name__, {**kept, **own}
    config.attention, config.attention_options = names, options


def image_tokens(model: nn.Module) -> Tokens | None:
    """Read off a vision transformer; None where nothing says it. transformers' encoders are not asked here."""
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "grid_size", None), tuple):
        return Tokens(config.grid_size, 0)
    for part in model.modules():
        given: Any = part
        grid = getattr(getattr(given, "patch_embed", None), "grid_size", None)
        if grid is not None and hasattr(given, "num_prefix_tokens"):  # timm
            return Tokens((int(grid[0]), int(grid[1])), int(given.num_prefix_tokens))
        image, patch = getattr(given, "image_size", None), getattr(given, "patch_size", None)
        if isinstance(image, int) and isinstance(patch, int) and hasattr(given, "class_token"):  # torchvision
            return Tokens((image // patch, image // patch), 1)
    return None


def given_tokens(model: nn.Module, grid_size: Sequence[int] | None, num_prefix_tokens: int | None) -> Tokens | None:
    """What a caller says about the tokens, else what the model says; None where neither does.

    Raises ValueError for a prefix without a grid.
    """
    known = image_tokens(model)
    if grid_size is None and known is None:
        if num_prefix_tokens:
            raise ValueError(f"convert: num_prefix_tokens is {num_prefix_tokens}; give grid_size, too")
        return None
    grid = known.grid if grid_size is None and known is not None else grid_size
    prefix = (0 if known is None else known.prefix) if num_prefix_tokens is None else num_prefix_tokens
    assert grid is not None
    return Tokens(tuple(int(one) for one in grid), prefix)


# --- other libraries' attention -------------------------------------------------------------------------------------


def _on_interface(model: nn.Module) -> bool:
    try:
        return bool(attention_modules(model))
    except UnsupportedModel:
        return False


def _is_fused(module: Any) -> bool:
    """One projection for q, k and v and one after, by the names that timm gives them."""
    return (
        isinstance(getattr(module, "qkv", None), nn.Linear)
        and isinstance(getattr(module, "proj", None), nn.Linear)
        and isinstance(getattr(module, "num_heads", None), int)
        and not hasattr(module, "head_point")
    )


def _is_torchs(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _softmax(path: str, old: Any) -> SoftmaxAttention:
    """The same layer as `SoftmaxAttention`. Raises UnsupportedModel where it is not the same."""
    torchs = _is_torchs(old)
    if more := (_more_than_torchs if torchs else _more_than_timms)(old):
        raise UnsupportedModel(f"convert: {path} ({type(old).__name__}) {more}, which no mechanism here takes over")
    width = old.embed_dim if torchs else old.qkv.in_features
    dropout = old.dropout if torchs else getattr(getattr(old, "attn_drop", None), "p", 0.0)
    with torch.device("meta"):  # draws no random numbers; the parameters are the old ones
        new = SoftmaxAttention(width, old.num_heads, dropout=dropout)
    if torchs:
        new.qkv.weight, new.qkv.bias, new.proj = old.in_proj_weight, old.in_proj_bias, old.out_proj
    else:
        new.qkv, new.proj = old.qkv, old.proj
    _answer(new, "torch" if torchs else "timm", bool(getattr(old, "batch_first", True)))
    return new


def _more_than_timms(old: Any) -> str | None:
    """What a layer does beyond `proj(softmax(q k^T / sqrt(d)) v)`."""
    width, heads = old.qkv.in_features, old.num_heads
    for name, child in old.named_children():
        idle = isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and not child.p)
        if name not in ("qkv", "proj", "attn_drop") and not idle:
            return f"has {name} ({type(child).__name__})"
    if own := next(iter(dict(old.named_parameters(recurse=False))), None):
        return f"has {own}"
    if old.qkv.out_features != 3 * width or (old.proj.in_features, old.proj.out_features) != (width, width):
        return f"projects {width} channels to {old.qkv.out_features}, and {old.proj.in_features} back"
    taken = list(inspect.signature(old.forward).parameters)
    if strange := [name for name in taken[1:] if name not in TIMM_ARGUMENTS]:
        return f"is called with {strange[0]}"
    scale = getattr(old, "scale", None)
    if isinstance(scale, float) and abs(scale - (width // heads) ** -0.5) > 1e-6:
        return f"scales its scores by {scale:g}"
    return None


def _more_than_torchs(old: Any) -> str | None:
    if not old._qkv_same_embed_dim:
        return "has keys or values of another width"
    if old.bias_k is not None or old.add_zero_attn:
        return "adds keys and values of its own"
    return None


# --- how they are called --------------------------------------------------------------------------------------------


def _answer(module: Any, library: str | None, batch_first: bool) -> None:
    """Let a module be called as a library calls its own attention; None is as headwise calls it."""
    if library is None:
        return
    module.called_as, module.batch_first = library, batch_first
    if library == "timm":
        module.register_forward_pre_hook(_from_timm, with_kwargs=True)
        return
    module.in_proj_bias = None  # with this nn.TransformerEncoderLayer does not go around the module
    module.register_forward_pre_hook(_from_torch, with_kwargs=True)
    module.register_forward_hook(_to_torch)


def _from_timm(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    given = dict(zip(TIMM_ARGUMENTS, args, strict=False)) | kwargs
    _refuse(module, given, {"attn_mask", "is_causal"})
    return (given["x"],), {}


def _from_torch(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    given: dict[str, Any] = {"need_weights": True} | dict(zip(TORCH_ARGUMENTS, args, strict=False)) | kwargs
    _refuse(module, given, {"key_padding_mask", "attn_mask", "is_causal", "need_weights"})
    x = given["query"]
    if given["key"] is not x or given["value"] is not x or x.ndim != 3:
        raise UnsupportedModel(
            f"{type(module).__name__}: stands in for self-attention over a batch, called with one tensor as query, key "
            "and value"
        )
    return (x if module.batch_first else x.transpose(0, 1),), {}


def _to_torch(module: Any, args: tuple, out: Tensor) -> tuple[Tensor, None]:
    return (out if module.batch_first else out.transpose(0, 1)), None


def _refuse(module: nn.Module, given: Mapping[str, Any], names: set[str]) -> None:
    for name in sorted(names):
        if given.get(name) is not None and given.get(name) is not False:
            raise UnsupportedModel(
                f"{type(module).__name__}: the network calls it with {name}, which a converted layer does not take; "
                "call the network without it"
            )
