"""Which entries of an attention module's projections belong to one head, in whatever way the family lays them out.

Separate, fused, interleaved and grouped projections are told apart by one run of the model: the features of a
projection that a head's queries, keys or values have a gradient from are that head's. Nothing is told from names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.attend.addresses import Head
from headwise.attend.read import Probe, Reading
from headwise.errors import UnsupportedModel
from headwise.hf._own_inputs import own_inputs
from headwise.hf._residual import evaluating
from headwise.hf.addresses import attention_modules, layer_paths, unwrap
from headwise.hf.projections import attention_shape, output_projection
from headwise.hf.session import probe

__all__ = ["HeadSlices", "ParameterSlice", "head_slices"]

PARTS = "qkvo"


@dataclass(frozen=True)
class ParameterSlice:
    """Entries of a parameter: those at `index` along `axis`. name: as in `model.named_parameters()`."""

    name: str
    axis: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class HeadSlices:
    """The slices of every head of some layers.

    slices: (head, "q", "k", "v" or "o") -> slices. users: parameter name -> for each index along the slices' axis, the
    heads that read or write through it; with grouped keys these are several.
    """

    slices: dict[tuple[Head, str], tuple[ParameterSlice, ...]]
    users: dict[str, dict[int, frozenset[Head]]]


def head_slices(model: nn.Module, layers: Iterable[int], *, tower: str = "") -> HeadSlices:
    """The slices of W_q, W_k, W_v (with their biases) and W_o of every head of `layers`; W_o's bias is no head's.

    What feeds no head alone, such as the norms of queries and keys or an output gate, belongs to none.
    Raises UnsupportedModel where a projection is neither `nn.Linear` nor GPT-2's `Conv1D` with floating-point weights
    in this process (quantised, adapted, sharded), or where a head's features cannot be told.
    """
    inner = unwrap(model)
    wanted = set(layers)
    modules = {
        layer: module for module, (name, layer) in attention_modules(inner).items() if name == tower and layer in wanted
    }
    paths = {module: path for path, module in inner.named_modules()}
    slices: dict[tuple[Head, str], tuple[ParameterSlice, ...]] = {}
    users: dict[str, dict[int, set[Head]]] = {}
    features = _features(inner, modules, tower)
    for layer, module in modules.items():
        shape = attention_shape(module)
        out = output_projection(module, inner)
        _check(out, paths[out])
        across = 0 if type(out).__name__ == "Conv1D" else 1
        for number in range(shape.heads):
            head = Head(layer, number, tower)
            span = range(number * shape.value_dim, (number + 1) * shape.value_dim)
            slices[head, "o"] = (ParameterSlice(f"{paths[out]}.weight", across, tuple(span)),)
            for part in "qkv":
                slices[head, part] = tuple(
                    ParameterSlice(f"{paths[projection]}.{name}", axis, index)
                    for projection, index in features[layer, number, part].items()
                    for name, axis in _axes(projection)
                )
    for (head, _), found in slices.items():
        for one in found:
            for place in one.index:
                users.setdefault(one.name, {}).setdefault(place, set()).add(head)
    frozen = {name: {place: frozenset(heads) for place, heads in at.items()} for name, at in users.items()}
    return HeadSlices(slices, frozen)


def _axes(projection: nn.Module) -> list[tuple[str, int]]:
    """The parameters of an input projection, with the axis of its output features."""
    weight = 1 if type(projection).__name__ == "Conv1D" else 0
    return [("weight", weight), *([("bias", 0)] if getattr(projection, "bias", None) is not None else [])]


def _check(projection: nn.Module, path: str) -> None:
    kind, weight = type(projection).__name__, getattr(projection, "weight", None)
    plain = type(projection) is nn.Linear or (kind == "Conv1D" and "transformers" in type(projection).__module__)
    if not plain or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        dtype = getattr(weight, "dtype", None)
        raise UnsupportedModel(
            f"{path}: {kind} with weights of {dtype} has no slices that can be trained; give a model with plain "
            "nn.Linear or Conv1D projections (load it without quantisation, merge adapters and earlier slices first)"
        )
    if weight.is_meta or hasattr(weight, "placements"):
        raise UnsupportedModel(
            f"{path}: its weights are not in this process (meta or sharded); choose slices before the model is sharded"
        )


class _Inputs(Probe):
    """Hands queries, keys and values of each call to a function, with their gradients' history."""

    def __init__(self, see: Any):
        super().__init__(differentiable=True)
        self.see = see

    def sparse(self, reading: Reading) -> None:
        self.see(reading.call)


def _features(
    model: PreTrainedModel, modules: dict[int, nn.Module], tower: str
) -> dict[tuple[int, int, str], dict[nn.Module, tuple[int, ...]]]:
    """(layer, head, part) -> the projections that make it last, with their output features."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[tuple[int, int, str], dict[nn.Module, tuple[int, ...]]] = {}
    leaves: dict[int, dict[nn.Module, Tensor]] = {layer: {} for layer in modules}

    def cut(layer: int):
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            leaves[layer][module] = leaf = out.detach().requires_grad_()
            return leaf

        return hook

    def straight(module: nn.Module, args: Any, out: Any) -> Any:
        given = args[0] if args else None
        if isinstance(out, Tensor) and isinstance(given, Tensor) and given.shape == out.shape:
            return out.detach() + (given - given.detach())  # a norm over all heads belongs to no head: pass it by
        return out

    def see(call: Any) -> None:
        if call.tower != tower or call.layer not in modules:
            return
        made = leaves[call.layer]
        for part, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
            # Random weights: what rotary embedding and norms mix within a head does not cancel.
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            for number in range(tensor.shape[1]):
                grads = torch.autograd.grad(
                    (tensor[:, number] * noise[:, number]).sum(), list(made.values()), retain_graph=True,
                    allow_unused=True,
                )  # fmt: skip
                parts = {}
                for module, grad in zip(made, grads, strict=True):
                    if grad is not None and bool((seen := (grad != 0).flatten(0, -2).any(0)).any()):
                        parts[module] = tuple(seen.nonzero().flatten().tolist())
                if not parts:
                    raise UnsupportedModel(
                        f"{paths[modules[call.layer]]}: the features of head {number}'s {part} cannot be told; "
                        "its projection is not a module that runs on its own"
                    )
                each = call.q.shape[1] // tensor.shape[1]  # query heads that read this key head
                for head in range(number * each, (number + 1) * each):
                    found[call.layer, head, part] = parts

    handles = []
    try:
        for layer, module in modules.items():
            out = output_projection(module, model)
            for child in module.modules():
                if child is not out and _is_map(child):
                    handles.append(child.register_forward_hook(cut(layer)))
                elif child is not module and not list(child.children()) and list(child.parameters()):
                    handles.append(child.register_forward_hook(straight))
        given, runner = own_inputs(model, tower, layer_paths(model, tower)[0])
        with evaluating(model), torch.enable_grad(), probe(model, _Inputs(see)):
            runner(**given)
    finally:
        for handle in handles:
            handle.remove()
    for layer, module in modules.items():
        for child in {child for (at, _, _), parts in found.items() if at == layer for child in parts}:
            _check(child, paths[child])
        if (layer, 0, "q") not in found:
            raise UnsupportedModel(f"{paths[module]}: it was not called on headwise's own inputs")
    return found


def _is_map(module: nn.Module) -> bool:
    """A linear map of any make: something with two-dimensional weights or a width, and no parts that are such."""
    if type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear):
        return True
    return isinstance(getattr(module, "out_features", None), int)
