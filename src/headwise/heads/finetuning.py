"""Fine-tune chosen heads and MLPs and nothing else: "precise" tuning.

A head's entries are rows of W_q, W_k and W_v (with their biases) and columns of W_o, wherever a family keeps them
(`headwise.hf.parameter_slices`). They become small parameters of their own,

    W = W_0 with W[index] = slice,

so that gradients kept, optimiser state, weight decay and accumulation know nothing of the frozen rest, which stays
bit-identical. The slice holds the values themselves, not a difference: weight decay and initial values are those of
ordinary fine-tuning, and with everything selected the two are the same bit for bit. Each forward copies the weights
that have slices once.

Any optimiser and transformers' `Trainer` work. `model.state_dict()`, and with it `save_pretrained` and the Trainer's
checkpoints, hold ordinary weights under their ordinary names, slices put in.

Paper: headwise/papers/arithmetic_heads.py (Zhang et al., 2024).
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import headwise
from headwise._files import atomic_path
from headwise.attend.addresses import Head, select_heads
from headwise.errors import InputError, UnsupportedModel
from headwise.hf.addresses import layout, unwrap
from headwise.hf.parameter_slices import head_slices
from headwise.hf.sites import find_sites

__all__ = ["FineTuning", "finetune_only", "load_slices"]

SLICE = "_slice"  # what the name of a parameter with a slice gets behind it


@dataclass(frozen=True)
class _Part:
    """What is trained of one parameter: the entries at `index` along `axis`; index None is all of it."""

    name: str
    axis: int = 0
    index: tuple[int, ...] | None = None


class FineTuning:
    """What `finetune_only` returns: the chosen entries of a model, trainable, until `merge` or `unload`.

    heads, mlps: what was chosen. In a `with` block, leaving it well merges; leaving it by an exception unloads.
    """

    def __init__(self, model: nn.Module, heads: list[Head], mlps: list[int], parts: list[_Part]):
        self.model, self.heads, self.mlps = model, heads, mlps
        self._parts = parts
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._whole: dict[str, Tensor] = {}  # what `unload` puts back
        self._active = True

    @property
    def entries(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def share(self) -> float:
        """The share of the model's numbers that is trained."""
        slices = sum(p.numel() for name, p in self.named_parameters() if name.endswith(SLICE))
        return self.entries / (sum(parameter.numel() for parameter in self.model.parameters()) - slices)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters; that of a slice of `x.weight` is `x.weight_slice`."""
        for part in self._parts:
            name = part.name if part.index is None else part.name + SLICE
            yield name, _parameter(self.model, name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters, for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """The trained entries only: `NAME` for a parameter trained whole, `NAME@AXIS` and `NAME@AXIS.index` else."""
        self._check_active()
        state = {}
        for part, (_, parameter) in zip(self._parts, self.named_parameters(), strict=True):
            if part.index is None:
                state[part.name] = parameter.detach().clone()
            else:
                state[f"{part.name}@{part.axis}"] = parameter.detach().clone()
                state[f"{part.name}@{part.axis}.index"] = torch.tensor(part.index)
        return state

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict()` as one safetensors file; `load_slices` puts it into a model."""
        from safetensors.torch import save_file

        about = {
            "headwise": headwise.__version__,
            "schema": "1",
            "model": type(self.model).__name__,
            "heads": json.dumps([str(head) for head in self.heads]),
            "mlps": json.dumps(self.mlps),
        }
        state = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_path(path) as temporary:
            save_file(state, temporary, metadata=about)

    def merge(self) -> nn.Module:
        """Write the slices into the weights; the model is then as it was before, apart from the trained entries."""
        self._check_active()
        for part in self._parts:
            if part.index is not None:
                module, name = _owner(self.model, part.name)
                with torch.no_grad():
                    module._parameters[name].data = getattr(module, name).detach()  # type: ignore[union-attr]
        return self._close()

    def unload(self) -> nn.Module:
        """Take everything back: the model is as it was before."""
        self._check_active()
        with torch.no_grad():
            for name, before in self._whole.items():
                _parameter(self.model, name).copy_(before)
        return self._close()

    def __enter__(self) -> "FineTuning":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._active:
            self.merge() if kind is None else self.unload()

    def __repr__(self) -> str:
        heads = ", ".join(map(str, self.heads)) or "no heads"
        mlps = f", MLPs {', '.join(map(str, self.mlps))}" if self.mlps else ""
        return f"FineTuning({heads}{mlps}: {self.entries:,} entries, {self.share:.2%} of the model)"

    def _open(self, dtype: torch.dtype | None) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for part in self._parts:
            if part.index is None:
                parameter = _parameter(self.model, part.name).requires_grad_()
                self._whole[part.name] = parameter.detach().clone()
            else:
                _slice(*_owner(self.model, part.name), part.axis, part.index, dtype)

    def _close(self) -> nn.Module:
        for part in self._parts:
            if part.index is not None:
                _unslice(*_owner(self.model, part.name))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags[name])
            if not self._flags[name]:
                parameter.grad = None
        self._active = False
        self._whole.clear()
        return self.model

    def _check_active(self) -> None:
        if not self._active:
            raise RuntimeError("FineTuning: it was merged or unloaded already; call finetune_only again")


def finetune_only(
    model: nn.Module,
    heads: str | Iterable[Head | str] | None = (),
    mlps: Sequence[int] | str = (),
    *,
    parts: str = "qkvo",
    shared: str = "leave",
    embeddings: str | None = None,
    also: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> FineTuning:
    """Freeze a model except for chosen heads and MLPs; the entries stay trainable until `merge` or `unload`.

    heads: a selection such as "9.6, 10.*" or heads of one tower, None for all of the main tower. mlps: layers, or
    "all". parts: which of a head's four slices. shared: k and v slices that serve query heads which were not chosen as
    well (grouped keys, and rotary keys that all heads share) are left frozen ("leave"), or trained ("train"), which
    changes those heads too. embeddings: "input", "output" or "both"; with tied weights only "both". also: names or
    patterns of parameters to train whole, such as "*norm*".
    dtype: of the slices; None is that of the weights. float32 slices keep small steps that bfloat16 would round away;
    the weights that the model computes with are rounded as before.

    Biases of W_o belong to no head and stay frozen, as do norms of queries and keys. Where such a norm goes over all
    heads (OLMo 2), a head's new entries change the others' scale.

    >>> with finetune_only(model, heads="1.2, 1.5", mlps=[1]) as tuning:  # doctest: +SKIP
    ...     Trainer(model=model, args=args, train_dataset=data).train()

    Raises ValueError for heads, layers, parts and names that are not there, where nothing is left to train, for tied
    weights of which only one end is chosen; UnsupportedModel for quantised, adapted or sharded projections and for MLPs
    that are no module of their own; RuntimeError where the model is being fine-tuned by this function already.
    """
    inner = unwrap(model)
    if any(isinstance(module, _Sliced) for module in inner.modules()):
        raise RuntimeError("finetune_only: this model has slices in training; merge or unload them first")
    if not parts or set(parts) - set("qkvo") or len(set(parts)) < len(parts):
        raise ValueError(f"finetune_only: parts is {parts!r}; expected letters of 'qkvo', each once")
    if shared not in ("leave", "train"):
        raise ValueError(f"finetune_only: shared is {shared!r}; expected 'leave' or 'train'")
    chosen = [] if heads == () or heads == [] else select_heads(heads, layout(inner))
    layers = _layers(inner, mlps)
    rows, axes = _entries(inner, chosen, parts, shared)
    whole = _whole(inner, layers, embeddings, also)
    found: list[_Part] = []
    for name, parameter in inner.named_parameters():
        index = rows.get(name, frozenset())
        if name in whole or (index and len(index) == parameter.shape[axes[name]]):
            found.append(_Part(name))
        elif index:
            found.append(_Part(name, axes[name], tuple(sorted(index))))
    if not found:
        why = (
            "every slice of these heads is shared with others; give shared='train'"
            if chosen
            else "give heads= or mlps="
        )
        raise ValueError(f"finetune_only: nothing is left to train; {why}")
    _refuse_tied(inner, {part.name for part in found})
    tuning = FineTuning(inner, chosen, layers, found)
    tuning._open(dtype)
    return tuning


def load_slices(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Write trained entries, as `FineTuning.save` or `.state_dict` gave them, into an ordinary model.

    Raises InputError for a file or names that do not fit the model; the model is then unchanged.
    """
    if isinstance(source, Mapping):
        state, where = dict(source), "the state"
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        where = os.fspath(source)
        try:
            state = load_file(where)
        except (OSError, SafetensorError) as error:
            raise InputError(f"load_slices: {where} cannot be read as safetensors ({error})") from None
    inner = unwrap(model)
    known = dict(inner.named_parameters())
    planned = []
    for key, value in state.items():
        if key.endswith(".index"):
            continue
        name, _, axis = key.partition("@")
        index = state.get(f"{key}.index")
        target = known.get(name)
        if target is None or (axis != "" and (index is None or not axis.isdigit() or int(axis) >= target.dim())):
            raise InputError(f"load_slices: {where} has {key!r}, which is no part of this {type(inner).__name__}")
        fits = list(target.shape)
        if axis and index is not None:
            fits[int(axis)] = len(index)
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < target.shape[int(axis)]:
                raise InputError(f"load_slices: {where}: indices of {key!r} lie outside {tuple(target.shape)}")
        if list(value.shape) != fits:
            raise InputError(f"load_slices: {where}: {key!r} has shape {tuple(value.shape)}; expected {tuple(fits)}")
        planned.append((target, value, int(axis) if axis else None, index))
    with torch.no_grad():
        for target, value, axis, index in planned:
            value = value.to(target)
            if axis is None or index is None:
                target.copy_(value)
            else:
                target.index_copy_(axis, index.to(target.device), value)
    return model


class _Sliced:
    """Mixed into the class of a module of whose parameters slices are trained; the parameters read as merged."""

    _slices: dict[str, int]  # parameter -> axis

    def _merged(self, name: str) -> Tensor:
        module: Any = self
        base, values = module._parameters[name], module._parameters[name + SLICE]
        return base.index_copy(module._slices[name], module._buffers[name + "_index"], values.to(base.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in self._slices:
            merged = self._merged(name)
            destination.pop(prefix + name + SLICE)
            destination[prefix + name] = merged if keep_vars else merged.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        module: Any = self
        for name, axis in self._slices.items():
            weight = state_dict.get(prefix + name)
            if weight is not None and prefix + name + SLICE not in state_dict:
                index = module._buffers[name + "_index"].to(weight.device)
                state_dict[prefix + name + SLICE] = weight.index_select(axis, index)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def _sliced_class(cls: type, names: Iterable[str]) -> type:
    """A subclass under the same name whose parameters `names` read as merged; its forward is that of `cls`."""
    merged = {name: property(lambda module, name=name: module._merged(name)) for name in names}
    return type(cls.__name__, (_Sliced, cls), {**merged, "__module__": cls.__module__, "_plain": cls})


def _slice(module: nn.Module, name: str, axis: int, index: Sequence[int], dtype: torch.dtype | None) -> None:
    place: Any = module
    weight = place._parameters[name]
    where = torch.tensor(index, device=weight.device)
    values = weight.detach().index_select(axis, where).to(dtype or weight.dtype).clone()
    place.register_parameter(name + SLICE, nn.Parameter(values))
    place.register_buffer(name + "_index", where, persistent=False)
    known = {**getattr(place, "_slices", {}), name: axis}
    place.__class__ = _sliced_class(getattr(type(place), "_plain", type(place)), known)
    place._slices = known


def _unslice(module: nn.Module, name: str) -> None:
    place: Any = module
    if hasattr(place, "_slices"):
        for one in place._slices:
            del place._parameters[one + SLICE], place._buffers[one + "_index"]
            place._non_persistent_buffers_set.discard(one + "_index")
        del place._slices
        place.__class__ = place._plain


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    module, last = _owner(model, name)
    parameter = module._parameters[last]
    assert parameter is not None  # names come from named_parameters
    return parameter


def _layers(model: nn.Module, mlps: Sequence[int] | str) -> list[int]:
    if isinstance(mlps, str) and mlps != "all":
        raise ValueError(f"finetune_only: mlps is {mlps!r}; expected layers such as [9, 10], or 'all'")
    if not len(mlps):
        return []
    having = [layer for layer, sites in enumerate(find_sites(model).layers) if sites.mlp is not None]
    if isinstance(mlps, str):
        return having
    for layer in mlps:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer not in having:
            raise ValueError(f"finetune_only: mlps has {layer!r}; layers with an MLP are {having[0]} to {having[-1]}")
    return sorted(set(mlps))


def _entries(
    model: nn.Module, heads: list[Head], parts: str, shared: str
) -> tuple[dict[str, frozenset[int]], dict[str, int]]:
    """Parameter -> the indices that train, and their axis."""
    rows: dict[str, set[int]] = {}
    axes: dict[str, int] = {}
    towers = {head.tower for head in heads}
    if len(towers) > 1:
        raise ValueError(f"finetune_only: heads of several towers ({', '.join(map(repr, sorted(towers)))}); give one")
    if not heads:
        return {}, {}
    found = head_slices(model, {head.layer for head in heads}, tower=next(iter(towers)))
    for head in heads:
        for part in parts:
            for one in found.slices[head, part]:
                users = found.users[one.name]
                free = [place for place in one.index if shared == "train" or users[place] <= set(heads)]
                if free:
                    rows.setdefault(one.name, set()).update(free)
                    axes[one.name] = one.axis
    return {name: frozenset(places) for name, places in rows.items()}, axes


def _whole(model: Any, layers: list[int], embeddings: str | None, also: Iterable[str]) -> set[str]:
    """Names of the parameters that train whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen: list[nn.Parameter] = []
    if layers:
        sites = find_sites(model)
        for layer in layers:
            mlp = sites.layers[layer].mlp
            weights = [p for p in mlp.parameters() if p.dim() > 1] if mlp is not None else []
            if mlp is None or len(weights) < 2:
                raise UnsupportedModel(
                    f"finetune_only: the MLP of layer {layer} of {type(model).__name__} is no module of its own; name "
                    "its parameters in also="
                )
            if not all(p.is_floating_point() for p in weights):
                raise UnsupportedModel(
                    f"finetune_only: the MLP of layer {layer} has weights of {weights[0].dtype}; load the model "
                    "without quantisation"
                )
            chosen += mlp.parameters()
    if embeddings not in (None, "input", "output", "both"):
        raise ValueError(f"finetune_only: embeddings is {embeddings!r}; expected 'input', 'output', 'both' or None")
    ends = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    for end, module in ends.items():
        if embeddings in (end, "both"):
            if module is None:
                raise ValueError(f"finetune_only: embeddings is {embeddings!r}, but the model has no {end} embeddings")
            chosen += module.parameters()
    found = {names[id(parameter)] for parameter in chosen}
    if embeddings in ("input", "output") and all(ends.values()) and ends["input"].weight is ends["output"].weight:
        raise ValueError(
            f"finetune_only: embeddings is {embeddings!r}, but this model's input and output embeddings are one tied "
            "tensor; give 'both', or untie them first"
        )
    for pattern in [also] if isinstance(also, str) else also:
        matching = fnmatch.filter(names.values(), pattern)
        if not matching:
            raise ValueError(f"finetune_only: also has {pattern!r}, which names no parameter of the model")
        found.update(matching)
    return found


def _refuse_tied(model: nn.Module, chosen: set[str]) -> None:
    """A parameter under several names is trained at all of its places: only embeddings may say so by one name."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    inputs: Any = getattr(model, "get_input_embeddings")()  # noqa: B009
    table = id(inputs.weight) if inputs is not None and hasattr(inputs, "weight") else None
    for key, names in places.items():
        if len(names) > 1 and key != table and (tied := chosen & set(names)):
            raise ValueError(
                f"finetune_only: {sorted(tied)[0]} is one tensor with {names[1]}; training it would change both places"
            )
