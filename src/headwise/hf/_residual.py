"""How a stack of layers writes to its residual stream, told from one run.

Every module called inside a layer is noted with its inputs and outputs. The layer adds a few of these outputs to the
stream; which ones, and with what factor, is found by fitting ``output - input`` with outputs that no other module
consumed. A fit to rounding error over all tokens and channels is the proof; nothing is told from a module's name.
"""

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedModel

__all__ = ["LayerRecipe", "Place", "Recipe", "WriteRecipe", "evaluating", "find_recipe", "tolerance"]

NORM = re.compile(r"norm|^ln", re.IGNORECASE)
FEED_FORWARD = re.compile("mlp|ffn|feed_?forward|moe", re.IGNORECASE)
MOST_WRITES = 4


@dataclass(frozen=True)
class Place:
    """Where a tensor passes: an argument of a module (position or keyword), or an element of its output."""

    path: str
    argument: int | str | None = None
    element: int | None = None


@dataclass(frozen=True)
class WriteRecipe:
    """One write of a layer: ``factor`` times the tensor at ``place``, made by a branch whose main part is ``main``."""

    place: Place
    factor: float
    main: str
    flat: bool = False
    """Batch and tokens are one axis there (OPT's MLP)."""


@dataclass(frozen=True)
class LayerRecipe:
    path: str
    residual: Place
    writes: Mapping[str, WriteRecipe]
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Everything about a stack that hooks need, by paths, so that it can be kept without keeping the model."""

    layers: tuple[LayerRecipe, ...]
    final: Place
    final_norm: str | None


@dataclass(eq=False)
class Call:
    """One call of a module during the run, with the calls made inside it."""

    path: str
    module: nn.Module
    arguments: list[tuple[int | str, Tensor]]
    parent: "Call | None"
    outputs: list[tuple[int | None, Tensor]] = field(default_factory=list)
    children: list["Call"] = field(default_factory=list)

    @property
    def passes_through(self) -> bool:
        """Hands one of its inputs on untouched, as dropout does in evaluation."""
        return any(given is made for _, given in self.arguments for _, made in self.outputs)

    def takes(self, tensor: Tensor) -> bool:
        return any(given is tensor for _, given in self.arguments)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error up to which the residual identity counts as exact."""
    return max(1e-5, 8 * torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every module's own mode back afterwards: dropout would break every identity."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_recipe(
    model: nn.Module, layers: list[str], attention: Mapping[nn.Module, str], run: Callable[[], Any]
) -> Recipe:
    """Run the model once and tell how its layers write.

    layers: paths of the stack's layers in order. attention: attention module -> name of its write.
    Raises UnsupportedModel when the layers do not only add to a residual stream.
    """
    name = type(model).__name__
    calls = _trace(model, layers, set(attention), run)
    by_layer = []
    for path in layers:
        mine = [call for call in calls if call.path == path]
        if len(mine) != 1:
            raise UnsupportedModel(
                f"{name}: layer {path} is called {len(mine)} times in one forward; sites need each layer to run once"
            )
        by_layer.append(mine[0])
    residuals = [_stream_in(call, name) for call in by_layer]
    made = [_stream_out(call, x, name) for call, (_, x) in zip(by_layer, residuals, strict=True)]
    for index in range(1, len(layers)):
        before, after = made[index - 1], residuals[index][1]
        if before.shape != after.shape or not torch.equal(before.to(after.device), after):
            raise UnsupportedModel(
                f"{name}: between layers {index - 1} and {index} something else writes to the residual stream; "
                "its writes do not add up and sites cannot be proved for this input"
            )
    recipes = [
        _layer(call, place, x, out, attention, name)
        for call, (place, x), out in zip(by_layer, residuals, made, strict=True)
    ]
    _refuse_shared(name, calls, recipes)
    last = made[-1]
    after = [call for call in calls if call.parent is None and call.takes(last) and _is_norm(call)]
    if after:
        argument = next(key for key, given in after[0].arguments if given is last)
        return Recipe(tuple(recipes), Place(after[0].path, argument=argument), after[0].path)
    element = next(element for element, tensor in by_layer[-1].outputs if tensor is last)
    return Recipe(tuple(recipes), Place(layers[-1], element=element), None)


def _trace(model: nn.Module, layers: list[str], attention: set[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """Calls of the layers with everything inside them, and of leaf modules outside, in order.

    Tensors are kept until the end, so that identity of objects is identity of tensors.
    """
    calls: list[Call] = []
    stack: list[Call] = []
    owner = threading.get_ident()

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() != owner:
                return
            given = [*enumerate(args), *kwargs.items()]
            tensors = [(key, value) for key, value in given if isinstance(value, Tensor)]
            stack.append(Call(path, module, tensors, stack[-1] if stack else None))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() != owner:
            return
        call = stack.pop()
        if isinstance(output, Tensor):
            call.outputs = [(None, output)]
        elif isinstance(output, tuple | list):
            call.outputs = [(index, part) for index, part in enumerate(output) if isinstance(part, Tensor)]
        (call.parent.children if call.parent is not None else calls).append(call)

    inside: dict[str, nn.Module] = {}
    for layer in layers:
        for path, module in model.get_submodule(layer).named_modules(prefix=layer):
            if not any(path.startswith(f"{other}.") for other, part in inside.items() if part in attention):
                inside[path] = module
    outside = {
        path: module
        for path, module in model.named_modules()
        if path and not any(f"{path}.".startswith(f"{layer}.") or layer.startswith(f"{path}.") for layer in layers)
    }
    handles = []
    try:
        for path, module in [*inside.items(), *outside.items()]:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _stream_in(call: Call, name: str) -> tuple[Place, Tensor]:
    named = dict(call.arguments)
    for key in (0, "hidden_states", "x", "hidden_state"):
        if key in named and named[key].is_floating_point():
            return Place(call.path, argument=key), named[key]
    raise UnsupportedModel(f"{name}: layer {call.path} takes no residual stream as its first argument")


def _stream_out(call: Call, x: Tensor, name: str) -> Tensor:
    for _, tensor in call.outputs:
        if tensor.shape == x.shape:
            return tensor
    raise UnsupportedModel(f"{name}: layer {call.path} gives back nothing of the shape of its input {tuple(x.shape)}")


def _levels(call: Call, attention: Mapping[nn.Module, str]) -> Iterator[list[Call]]:
    """The calls inside a layer, ever finer; attention modules stay whole."""
    level = call.children
    while True:
        yield level
        finer = [
            part
            for node in level
            for part in (node.children if node.children and node.module not in attention else [node])
        ]
        if finer == level:
            return
        level = finer


def _layer(
    call: Call, residual: Place, x: Tensor, out: Tensor, attention: Mapping[nn.Module, str], name: str
) -> LayerRecipe:
    delta = (out.double() - x.to(out.device).double()).flatten()
    bound = tolerance(x.dtype) * float(delta.norm()) + torch.finfo(x.dtype).eps * 8 * float(out.double().norm())
    for level in _levels(call, attention):
        chosen = _fit(level, x, delta, bound, tolerance(x.dtype))
        if chosen is not None:
            norms = tuple(dict.fromkeys(node.path for node in level if _is_norm(node)))
            return LayerRecipe(call.path, residual, _label(call, level, chosen, attention, x.dim(), name), norms)
    raise UnsupportedModel(
        f"{name}: what layer {call.path} adds to its input is not a sum of its modules' outputs (a norm on the "
        "residual stream itself, as in BERT, or a gate); sites need a residual stream that is only added to"
    )


Write = tuple[Call, int | None, float]


def _fit(level: list[Call], x: Tensor, delta: Tensor, bound: float, slack: float) -> list[Write] | None:
    """The fewest outputs whose weighted sum is what the layer added; later calls first, as writes come last."""
    consumed = [given for node in level if not node.passes_through for _, given in node.arguments]
    found: list[tuple[Call, int | None, Tensor]] = []
    for node in level:
        for element, tensor in node.outputs:
            fits = tensor.shape[-1:] == x.shape[-1:] and tensor.numel() == x.numel() and tensor.is_floating_point()
            if fits and tensor is not x and not node.takes(tensor):
                found.append((node, element, tensor))
    terminal = [item for item in found if not any(item[2] is tensor for tensor in consumed)]
    for candidates in (terminal, found):
        columns = [tensor.to(delta.device).double().flatten() for _, _, tensor in candidates]
        for size in range(1, min(MOST_WRITES, len(candidates)) + 1):
            for subset in itertools.combinations(reversed(range(len(candidates))), size):
                matrix = torch.stack([columns[index] for index in subset], 1)
                factors = torch.linalg.lstsq(matrix, delta[:, None]).solution[:, 0]
                whole = torch.where((factors - 1).abs() <= 100 * slack, 1.0, factors.round(decimals=6))
                if float((matrix @ whole - delta).norm()) <= bound:
                    order = sorted(zip(subset, whole.tolist(), strict=True))
                    return [(candidates[index][0], candidates[index][1], factor) for index, factor in order]
    return None


def _label(
    call: Call, level: list[Call], writes: list[Write], attention: Mapping[nn.Module, str], dim: int, name: str
) -> dict[str, WriteRecipe]:
    """Name each write by the branch that made it: attention by its module, the others by their order."""
    labelled: dict[str, WriteRecipe] = {}
    others: list[Write] = []
    branches = [_branch(node, level) for node, _, _ in writes]
    unclaimed = [module for module in attention if any(part is module for part in call.module.modules())]
    for (node, element, factor), branch in zip(writes, branches, strict=True):
        module = next(
            (m for m in unclaimed if any(m is inner for part in branch for inner in part.module.modules())), None
        )
        if module is None:
            others.append((node, element, factor))
            continue
        unclaimed.remove(module)
        path = next(path for path, part in call.module.named_modules(prefix=call.path) if part is module)
        labelled[attention[module]] = _write(node, element, factor, path, dim)
    names = ["mixer", "mlp"]
    if len(others) == 1 and (labelled or unclaimed or _feeds_forward(others)):
        names = ["mlp"]
    if unclaimed and not labelled:  # its output was reshaped before it was normed: the first write is its
        names = [attention[unclaimed[0]], "mlp"]
    if len(others) > len(names):
        raise UnsupportedModel(
            f"{name}: layer {call.path} writes {len(writes)} times to the residual stream; "
            f"{', '.join([*labelled, *names])} are known"
        )
    for label, (node, element, factor) in zip(names, others, strict=False):
        branch = [part for part in _branch(node, level) if not _is_norm(part)] or [node]
        main = max(branch, key=lambda part: sum(p.numel() for p in part.module.parameters()))
        labelled[label] = _write(node, element, factor, main.path, dim)
    return labelled


def _write(node: Call, element: int | None, factor: float, main: str, dim: int) -> WriteRecipe:
    tensor = next(tensor for index, tensor in node.outputs if index == element)
    return WriteRecipe(Place(node.path, element=element), factor, main, flat=tensor.dim() != dim)


def _feeds_forward(others: list[Write]) -> bool:
    """A layer with one write and no attention: a feed-forward block is no mixer of tokens."""
    return any(
        re.search("mlp|ffn|feed_?forward|moe", type(node.module).__name__, re.IGNORECASE) for node, _, _ in others
    )


def _branch(node: Call, level: list[Call]) -> list[Call]:
    """The calls that led to a call, each handing its output to the next as it is."""
    branch, frontier = [node], [node]
    while frontier:
        current = frontier.pop()
        for other in level:
            if other in branch:
                continue
            if any(current.takes(tensor) for _, tensor in other.outputs):
                branch.append(other)
                frontier.append(other)
    return branch


def _is_norm(call: Call) -> bool:
    module = call.module
    named = NORM.search(type(module).__name__) or NORM.search(call.path.rsplit(".", 1)[-1])
    return bool(named) and sum(p.dim() > 1 for p in module.parameters()) == 0


def _refuse_shared(name: str, calls: list[Call], layers: Iterable[LayerRecipe]) -> None:
    """A write made by a module that runs for several writes cannot be told apart by a hook on it."""

    def walk(nodes: list[Call]) -> Iterator[Call]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    counts: dict[int, int] = {}
    for call in walk(calls):
        counts[id(call.module)] = counts.get(id(call.module), 0) + 1
    by_path = {call.path: call.module for call in walk(calls)}
    for layer in layers:
        for label, write in layer.writes.items():
            if counts[id(by_path[write.place.path])] > 1:
                raise UnsupportedModel(
                    f"{name}: the module {write.place.path}, which makes the {label} write of layer {layer.path}, "
                    "runs several times in one forward; sites need one call per write"
                )
