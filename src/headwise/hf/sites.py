"""What attention alone does not show: the residual stream, MLPs, norms and logits, found by structure and proved.

A site is written ``kind:layer``:

    residual:3     the stream before layer 3 (``residual:0``: the embedding)         [b t c]
    attention:3    what attention adds to the stream, after any norm inside the branch; cross:3 for cross attention
    mlp:3          what the MLP adds; mixer:3 what a layer without attention adds in its place
    heads:3        the heads' outputs before the projection that mixes them, gated where the family gates  [b t h e]
    projection:3   the output of that projection; cross-heads:3 and cross-projection:3 for cross attention
    final          the stream before the final norm
    logits         the model's logits

``mlp:*`` and ``mlp`` mean every layer that has one. ``record`` reads sites and ``replace`` writes them while the model
runs; both are ordinary forward hooks, undone on exit.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.attend.addresses import nearest
from headwise.errors import UnsupportedModel
from headwise.hf._hooks import Spot, fitting, hook, joined, split
from headwise.hf._own_inputs import own_inputs
from headwise.hf._residual import LayerRecipe, Place, Recipe, evaluating, find_recipe, tolerance
from headwise.hf.addresses import attention_modules, layer_paths, unwrap
from headwise.hf.projections import attention_shape, output_projection
from headwise.hf.shares import head_share

__all__ = ["LayerSites", "Recording", "Site", "Sites", "find_sites", "record", "replace"]

KINDS = (
    "residual", "attention", "cross", "mixer", "mlp", "heads", "projection", "cross-heads", "cross-projection", "final",
    "logits",
)  # fmt: skip
WRITES = ("attention", "cross", "mixer", "mlp")
WITHOUT_LAYER = ("final", "logits")


@dataclass(frozen=True)
class Site:
    """One place in a model: a kind and, except for ``final`` and ``logits``, a layer."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}:{self.layer}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read "mlp:3" or "final". Raises ValueError for anything else."""
        kind, _, layer = text.strip().partition(":")
        if kind not in KINDS:
            raise ValueError(f"site: {text!r} is none; kinds are {', '.join(KINDS)}{nearest(kind, KINDS)}")
        if (kind in WITHOUT_LAYER) == bool(layer) or (layer and not re.fullmatch("[0-9]+", layer)):
            wanted = "stands without a layer" if kind in WITHOUT_LAYER else f"needs a layer, as in {kind}:3"
            raise ValueError(f"site: {text!r} cannot be read; {kind} {wanted}")
        return cls(kind, int(layer) if layer else None)


@dataclass(frozen=True)
class LayerSites:
    """The modules of one layer. ``projection`` mixes the heads; ``attention`` is None in layers without it."""

    layer: nn.Module
    attention: nn.Module | None
    projection: nn.Module | None
    cross: nn.Module | None
    mlp: nn.Module | None
    norms: tuple[nn.Module, ...]


class Sites:
    """The sites of one tower of a model whose residual identity was proved. Made by `find_sites`."""

    def __init__(self, model: PreTrainedModel, tower: str, recipe: Recipe, error: float) -> None:
        self.model, self.tower, self.error = model, tower, error
        self._recipe = recipe
        self._modules = {layer: {} for layer in range(len(recipe.layers))}
        towers = (tower, "cross" if tower in ("", "decoder") else tower)
        for module, (name, layer) in attention_modules(model).items():
            if name in towers:
                self._modules[layer]["cross" if name == "cross" != tower else "attention"] = module

    @property
    def layers(self) -> list[LayerSites]:
        """The modules of every layer."""
        return [self._layer(index, recipe) for index, recipe in enumerate(self._recipe.layers)]

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last layer and the unembedding; None where there is none."""
        path = self._recipe.final_norm
        return None if path is None else self.model.get_submodule(path)

    @property
    def unembedding(self) -> nn.Module | None:
        """The map from the normed stream to logits; None for models and towers without one."""
        return self.model.get_output_embeddings() if self.tower in ("", "decoder") else None

    def writes(self, layer: int | None = None) -> list[Site]:
        """Everything that is added to the stream, in order, of one layer or all."""
        chosen = range(len(self._recipe.layers)) if layer is None else [layer]
        return [Site(kind, index) for index in chosen for kind in WRITES if kind in self._recipe.layers[index].writes]

    def all(self) -> list[Site]:
        """Every site of the model."""
        found = [Site("residual", layer) for layer in range(len(self._recipe.layers))]
        found += self.writes()
        for layer, modules in self._modules.items():
            for name, module in modules.items():
                if _has_projection(module, self.model):
                    prefix = "" if name == "attention" else "cross-"
                    found += [Site(f"{prefix}heads", layer), Site(f"{prefix}projection", layer)]
        return [*found, Site("final"), *([Site("logits")] if self.unembedding is not None else [])]

    def select(self, chosen: "str | Site | Iterable[str | Site] | Sites | None") -> list[Site]:
        """The sites that names stand for, each once; ``mlp`` and ``mlp:*`` mean every layer that has one.

        Raises ValueError for a site that this model has not.
        """
        every = self.all()
        if chosen is None or isinstance(chosen, Sites):
            return every
        found: dict[Site, None] = {}
        for item in [chosen] if isinstance(chosen, str | Site) else chosen:
            if isinstance(item, Site):
                found[self._check(item, every)] = None
                continue
            kind = item.strip().removesuffix(":*")
            if kind in KINDS and kind not in WITHOUT_LAYER:
                matching = [site for site in every if site.kind == kind]
                if not matching:
                    kinds = list(dict.fromkeys(site.kind for site in every))
                    raise ValueError(f"site: {item!r} is none of {self._name}'s; it has {', '.join(kinds)}")
                found.update(dict.fromkeys(matching))
            else:
                found[self._check(Site.parse(item), every)] = None
        return list(found)

    def prove(self, inputs: Mapping[str, Any]) -> float:
        """Relative error of "embedding plus all writes equals the final residual" on these inputs.

        Raises UnsupportedModel when it exceeds rounding (1e-5 in float32).
        """
        with evaluating(self.model), torch.no_grad(), _recording(self, self._summands()) as seen:
            self.model(**inputs)
        self.error = _error(self, seen)
        return self.error

    def _summands(self) -> list[Site]:
        return [Site("residual", 0), *self.writes(), Site("final")]

    def _layer(self, index: int, recipe: LayerRecipe) -> LayerSites:
        modules = self._modules[index]
        attention = modules.get("attention")
        projected = attention is not None and _has_projection(attention, self.model)
        mlp = recipe.writes.get("mlp")
        return LayerSites(
            layer=self.model.get_submodule(recipe.path),
            attention=attention,
            projection=output_projection(attention, self.model) if attention is not None and projected else None,
            cross=modules.get("cross"),
            mlp=None if mlp is None else self.model.get_submodule(mlp.main),
            norms=tuple(self.model.get_submodule(path) for path in recipe.norms),
        )

    def _check(self, site: Site, every: list[Site]) -> Site:
        if site not in every:
            have = [str(other) for other in every if other.kind == site.kind]
            known = f"{have[0]} to {have[-1]}" if have else ", ".join(dict.fromkeys(other.kind for other in every))
            raise ValueError(f"site: {site} is none of {self._name}'s; it has {known}")
        return site

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _spot(self, site: Site) -> Spot:
        if site.kind == "logits":
            return Spot(self.model, Place(""))
        if site.kind == "final":
            return Spot(self.model.get_submodule(self._recipe.final.path), self._recipe.final)
        layer = self._recipe.layers[site.layer or 0]
        stream = Spot(self.model.get_submodule(layer.path), layer.residual)
        if site.kind == "residual":
            return stream
        if site.kind in layer.writes:
            write = layer.writes[site.kind]
            module = self.model.get_submodule(write.place.path)
            return Spot(module, write.place, write.factor, stream=stream if write.flat else None)
        module = self._modules[site.layer or 0]["cross" if site.kind.startswith("cross-") else "attention"]
        projection = output_projection(module, self.model)
        if site.kind.endswith("projection"):
            return Spot(projection, Place(""))
        heads, _, width = attention_shape(module)
        place = Place("", argument=0)
        return Spot(projection, place, heads=heads, width=heads * width, share=head_share(module))


class Recording:
    """What `record` saw: site -> the tensor of the last forward."""

    def __init__(self, chosen: list[Site], every: bool) -> None:
        self._seen: dict[Site, list[Tensor]] = {site: [] for site in chosen}
        self._every = every

    def __getitem__(self, site: str | Site) -> Tensor:
        seen = self.calls(site)
        if not seen:
            raise KeyError(f"site {site} has not been passed yet; run the model inside the block")
        return seen[-1]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, site: object) -> bool:
        return (Site.parse(site) if isinstance(site, str) else site) in self._seen

    def items(self) -> Iterator[tuple[Site, Tensor]]:
        """Sites that have been passed, with their tensors."""
        return ((site, seen[-1]) for site, seen in self._seen.items() if seen)

    def stack(self, kind: str) -> Tensor:
        """The tensors of all recorded sites of a kind, one layer after the other: [l ...]."""
        found = [tensor for site, tensor in self.items() if site.kind == kind]
        return torch.stack([tensor.to(found[0].device) for tensor in found])  # layers may lie on several devices

    def calls(self, site: str | Site) -> list[Tensor]:
        """The tensors of all forwards, in order (with ``every=True``; otherwise only the last)."""
        site = Site.parse(site) if isinstance(site, str) else site
        if site not in self._seen:
            raise KeyError(f"site {site} is not recorded; ask for it when recording")
        return self._seen[site]

    def _add(self, site: Site, tensor: Tensor) -> None:
        kept = self._seen[site]
        if not self._every:
            kept.clear()
        kept.append(tensor)


Replacement = Tensor | float | Callable[[Tensor], Tensor]

_RECIPES: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int], tuple[Recipe, float]]]" = (
    weakref.WeakKeyDictionary()
)


def find_sites(model: nn.Module, *, tower: str | None = None, inputs: Mapping[str, Any] | None = None) -> Sites:
    """The sites of a tower (None: the main one), proved by running the model once on a few tokens of its own.

    inputs: run on these instead, for towers whose inputs headwise cannot make up.
    Raises UnsupportedModel, naming the class, when embedding plus all writes is not the final residual.
    """
    inner = unwrap(model)
    places = attention_modules(inner)
    names = list(dict.fromkeys(name for name, _ in places.values()))
    if tower is None:
        tower = next((name for name in ("", "decoder") if name in names), names[0])
    key = (tower, hash(tuple((path, type(module)) for path, module in inner.named_modules())))
    known = _RECIPES.setdefault(inner, {})
    if key not in known or inputs is not None:
        known[key] = _prove(inner, tower, inputs)
    return Sites(inner, tower, *known[key])


@contextmanager
def record(
    model: nn.Module,
    chosen: str | Site | Iterable[str | Site] | Sites | None = None,
    *,
    tower: str | None = None,
    every: bool = False,
) -> Iterator[Recording]:
    """Record sites while the model runs inside the block; None means all of them, `Sites` all of its.

    Tensors are copies with their gradients' history; run under ``torch.no_grad`` where none is wanted. A recording sees
    what the blocks opened before it have made of a value. every: keep the tensors of all forwards, not of the last.
    """
    found = _resolve(model, chosen, tower)
    with _recording(found, found.select(chosen), every) as recording:
        yield recording


@contextmanager
def replace(model: nn.Module, values: Mapping[Any, Replacement], *, tower: str | None = None) -> Iterator[None]:
    """Put values in the place of sites while the model runs inside the block.

    values: site -> a tensor or number, broadcast to the site's shape, or a function of the site's value that returns
    such. Keys such as ``mlp:*`` stand for every layer. Of nested blocks the outer ones act first.
    Raises ValueError inside the forward when a shape does not fit.
    """
    found = _resolve(model, None, tower)
    planned = [(site, value) for name, value in values.items() for site in found.select(name)]
    with ExitStack() as stack:
        for site, value in planned:
            stack.callback(hook(found._spot(site), partial(_put, site, found._spot(site), value)))
        yield


@contextmanager
def _recording(found: Sites, wanted: list[Site], every: bool = False) -> Iterator[Recording]:
    recording = Recording(wanted, every)
    with ExitStack() as stack:
        for site in wanted:
            spot = found._spot(site)
            stack.callback(hook(spot, partial(_keep, recording, site, spot)))
        yield recording


def _resolve(model: nn.Module, chosen: Any, tower: str | None) -> Sites:
    if not isinstance(chosen, Sites):
        return find_sites(model, tower=tower)
    if chosen.model is not unwrap(model):
        raise ValueError(
            f"sites: these belong to another {type(chosen.model).__name__} object; make new ones with find_sites(model)"
        )
    return chosen


def _keep(recording: Recording, site: Site, spot: Spot, value: Tensor) -> None:
    value = split(value, spot)
    # A copy: some families change the stream in place behind the hook.
    recording._add(site, value.clone() if spot.factor == 1 else value * spot.factor)


def _put(site: Site, spot: Spot, value: Replacement, old: Tensor) -> Tensor:
    before = split(old, spot)
    if spot.factor != 1:
        before = before * spot.factor
    after = fitting(value(before) if callable(value) else value, before, site)
    if after is before:
        return old
    return joined(after / spot.factor if spot.factor != 1 else after, old, spot)


def _has_projection(module: nn.Module, model: PreTrainedModel) -> bool:
    try:
        output_projection(module, model)
    except UnsupportedModel:
        return False
    return True


def _prove(model: PreTrainedModel, tower: str, inputs: Mapping[str, Any] | None) -> tuple[Recipe, float]:
    paths = layer_paths(model, tower)
    labels = {
        module: "cross" if name == "cross" != tower else "attention"
        for module, (name, _) in attention_modules(model).items()
        if name == tower or (name == "cross" and tower in ("", "decoder"))
    }
    given, runner = (inputs, model) if inputs is not None else own_inputs(model, tower, paths[0])
    with evaluating(model), torch.no_grad():
        recipe = find_recipe(model, paths, labels, lambda: runner(**given))
        found = Sites(model, tower, recipe, float("nan"))
        with _recording(found, found._summands()) as seen:
            runner(**given)
    return recipe, _error(found, seen)


def _error(found: Sites, seen: Recording) -> float:
    total = seen["residual:0"].double()
    for site in found.writes():
        total = total + seen[site].to(total.device).double().reshape(total.shape)
    final = seen["final"].to(total.device)
    error = float((total - final.double()).norm() / final.double().norm().clamp(min=1e-30))
    bound = tolerance(final.dtype) * len(found.writes()) ** 0.5
    if not error <= bound:
        raise UnsupportedModel(
            f"{found._name}: embedding plus all writes differs from the final residual by {error:.1e} (at most "
            f"{bound:.0e} is rounding); something else writes to the residual stream for this input"
        )
    return error
