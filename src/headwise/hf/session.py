"""Probes and edits on a model object: `steer`, `attach`, `probe`.

A session exists while anything is attached to a model. It belongs to the model, not to a thread: every call of that
model is read and edited, from whichever thread it comes, and no other model is.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout, select_heads
from headwise.attend.call import Call
from headwise.attend.edit import Edit, Heads, OutputEdit
from headwise.attend.machine import BoundEdit, attend
from headwise.attend.point import PointVisit, head_points, point_layout
from headwise.attend.read import Probe, Reading
from headwise.attend.step import Step
from headwise.errors import UnsupportedModel
from headwise.hf import dispatch
from headwise.hf.addresses import attention_modules, layout, tower_kinds, unwrap
from headwise.hf.calls import Plain, read_call
from headwise.hf.projections import attention_shape, head_writes, output_projection
from headwise.hf.shares import HeadShare, gathered, head_share
from headwise.hf.steps import StepTracker, find_stacks

__all__ = ["Handle", "attach", "probe", "steer"]

Scores = Callable[[str], dict[Head, float | None]]

_sessions: "weakref.WeakKeyDictionary[nn.Module, Session | PointSession]" = weakref.WeakKeyDictionary()


@dataclass
class _Context:
    """What one `steer` or `probe` brought."""

    edits: list[BoundEdit]
    probes: list[Probe]
    watches: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def watch(self, model: nn.Module, step: Callable[[], Step | None]) -> None:
        """Let the edits hang their hooks on a model, and bring their probes. None hangs there if it raises."""
        with contextlib.ExitStack() as hung:
            for bound in self.edits:
                for undo in bound.edit.watch(model, step):
                    hung.callback(undo)
            self.probes = [*self.probes, *(probe for bound in self.edits for probe in bound.edit.probes())]
            self.watches = hung.pop_all()


@dataclass(frozen=True)
class _Placed:
    """What is attached to one layer. uses_generated: an edit names a group that may hold generated tokens."""

    edits: list[BoundEdit]
    probes: list[Probe]
    uses_generated: bool


class Handle:
    """What `attach` returns: `remove()` undoes it, once."""

    def __init__(self, session: "Session | PointSession", context: _Context):
        self._session, self._context = session, context

    def remove(self) -> None:
        """Take the probes and edits off the model. Removing twice does nothing."""
        session, self._session = self._session, None
        if session is not None:
            session.close(self._context)


def attach(model: nn.Module, *edits: Edit | Probe, scores: Scores | None = None) -> Handle:
    """Attach edits and probes to a model until `handle.remove()`.

    scores: gives the scores of a probe by name, for selections such as "top:sink:20".
    A network built from headwise's own mechanisms is any module with `attend.HeadPoint`s in it. Raises UnsupportedModel
    for a model that cannot be steered, ValueError for heads that it does not have, RuntimeError when another thread has
    its own edits on this model.
    """
    points = bool(head_points(model))
    inner = model if points else unwrap(model)  # a model and what wraps it share their attention modules
    with dispatch.LOCK:
        session = _sessions.get(inner)
        if session is None:
            session = PointSession(inner) if points else Session(inner)
        context = session.bind(edits, scores)
        session.open(context)
    return Handle(session, context)


@contextlib.contextmanager
def steer(model: nn.Module, *edits: Edit, scores: Scores | None = None) -> Iterator[Handle]:
    """Change how a model attends inside a `with` block; everything is undone at its end.

    Edits apply in the order given, those of outer blocks first. A cache that was filled inside the block keeps the
    edits' effect on its keys and values.
    """
    handle = attach(model, *edits, scores=scores)
    try:
        yield handle
    finally:
        handle.remove()


@contextlib.contextmanager
def probe(model: nn.Module, *probes: Probe) -> Iterator[tuple[Probe, ...]]:
    """Read attention inside a `with` block. The model's outputs stay the same bit for bit."""
    handle = attach(model, *probes)
    try:
        yield probes
    finally:
        handle.remove()


def _bind(model: nn.Module, items: Sequence[Edit | Probe], layout: Layout, scores: Scores | None) -> _Context:
    """Resolve the heads of edits. Nothing has changed if it raises."""
    edits, probes = [], []

    def select(heads: Heads) -> list[Head]:
        return select_heads(heads, layout, scores=scores)

    for item in items:
        if isinstance(item, Probe):
            probes.append(item)
            continue
        if not isinstance(item, Edit):
            raise TypeError(f"steer: {item!r} is {type(item).__name__}; give edits (headwise.steering, .attend)")
        for edit in item.attached(model, select):
            if edit.neutral:
                continue
            heads: dict[tuple[str, int], list[int]] = {}
            for head in edit.named(layout, scores):
                heads.setdefault((head.tower, head.layer), []).append(head.head)
            edits.append(BoundEdit(edit, {place: sorted(named) for place, named in heads.items()}))
    return _Context(edits, probes)


class PointSession:
    """Everything attached to a network of headwise's own mechanisms, through its `HeadPoint`s."""

    def __init__(self, model: nn.Module):
        self.model, self.points = model, head_points(model)
        self.layout = point_layout(self.points)
        self.contexts: list[_Context] = []

    def bind(self, items: Sequence[Edit | Probe], scores: Scores | None) -> _Context:
        return _bind(self.model, items, self.layout, scores)

    def open(self, context: _Context) -> None:
        context.watch(self.model, lambda: None)
        self.contexts.append(context)
        self._show()

    def close(self, context: _Context) -> None:
        with dispatch.LOCK:
            self.contexts = [c for c in self.contexts if c is not context]
            self._show()
        context.watches.close()

    def _show(self) -> None:
        edits = [bound for context in self.contexts for bound in context.edits]
        probes = [probe for context in self.contexts for probe in context.probes]
        for layer, point in enumerate(self.points):
            point.visit = PointVisit(layer, edits, probes) if self.contexts else None
        if self.contexts:
            _sessions[self.model] = self
        else:
            _sessions.pop(self.model, None)


class Session:
    """Everything attached to one model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.places = attention_modules(model)
        self.shares = {module: share for module in self.places if (share := head_share(module)) is not None}
        self.layout = layout(model)
        self.kinds = tower_kinds(model)
        self.contexts: list[_Context] = []
        self.owner = 0
        self._thread = threading.local()
        self._latest: dict[str, StepTracker] = {}
        self._hooks: list[Any] = []
        self._projections: dict[nn.Module, nn.Module] = {}
        self._projections_watched = False  # from the first probe of outputs on
        self._by_place: dict[tuple[str, int], _Placed] = {}
        self._configs: list[Any] = []
        self._warned = False

    # Opening and closing

    def bind(self, items: Sequence[Edit | Probe], scores: Scores | None) -> _Context:
        return _bind(self.model, items, self.layout, scores)

    def open(self, context: _Context) -> None:
        thread = threading.get_ident()
        if self.contexts and self.owner != thread and context.edits and any(c.edits for c in self.contexts):
            raise RuntimeError(
                "steer: this model already has edits from another thread, and they would mix; steer it from one "
                "thread, or give each thread a model of its own"
            )
        context.watch(self.model, lambda: self.step(self.layout.main.name))
        if not self.contexts:
            try:
                self._install()
            except BaseException:
                context.watches.close()
                raise
        self.owner = thread
        self.contexts.append(context)
        self._by_place = {}
        if not self._projections_watched and any(probe.reads_outputs for probe in context.probes):
            self._projections_watched = True
            for module, projection in self._projections.items():
                self._hooks.append(projection.register_forward_hook(self._mixed(module, projection)))

    def close(self, context: _Context) -> None:
        with dispatch.LOCK:
            self.contexts = [c for c in self.contexts if c is not context]
            self._by_place = {}
            if not self.contexts:
                self._uninstall()
        context.watches.close()

    def _install(self) -> None:
        if any(id(module) in dispatch._handlers for module in self.places):
            raise RuntimeError(
                f"steer: {type(self.model).__name__} is part of a model, or holds one, to which something is attached; "
                "attach everything to the same object"
            )
        try:
            for config in {id(m.config): m.config for m in self.places}.values():
                dispatch.switch(config)
                self._configs.append(config)
            for module in self.places:
                dispatch._handlers[id(module)] = self.handle
            stacks = find_stacks(self.model, self.places)
            if not any(stack is self.model for stack in stacks.values()):
                self._hooks.append(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
            towers: dict[nn.Module, list[str]] = {}
            for tower, stack in stacks.items():
                towers.setdefault(stack, []).append(tower)
            for stack, names in towers.items():
                hook = self._enter_stack(stack, names)
                self._hooks.append(stack.register_forward_pre_hook(hook, with_kwargs=True))
                self._hooks.append(stack.register_forward_hook(self._leave_stack(names)))
            self._projections = {module: output_projection(module, self.model) for module in self.places}
            _sessions[self.model] = self
        except BaseException:
            self._uninstall()
            raise

    def _uninstall(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in self.places:
            dispatch._handlers.pop(id(module), None)
        for config in self._configs:
            dispatch.restore(config)
        self._hooks, self._configs = [], []
        self._projections, self._projections_watched = {}, False
        self._latest.clear()
        _sessions.pop(self.model, None)

    # Following the sequence

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if dispatch.is_aside():
            return
        given = dict(kwargs)
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            given.setdefault("input_ids", args[0])
        self._thread.outer = given

    def _enter_stack(self, stack: nn.Module, towers: list[str]):
        image_token = None
        if "" in towers:
            config = self.model.config
            image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if dispatch.is_aside():
                return
            trackers = self._trackers()
            for tower in towers:
                if tower not in trackers:
                    trackers[tower] = StepTracker(stack, image_token)
                # The model's own arguments are the encoder's, where there is one.
                outer = {} if tower in ("decoder", "cross") else getattr(self._thread, "outer", {})
                trackers[tower].begin(args, kwargs, outer)
                self._latest[tower] = trackers[tower]

        return hook

    def _leave_stack(self, towers: list[str]):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            trackers = self._trackers()
            for tower in towers:
                if tower in trackers:
                    trackers[tower].end(output)

        return hook

    def _trackers(self) -> dict[str, StepTracker]:
        if not hasattr(self._thread, "trackers"):
            self._thread.trackers = {}
        return self._thread.trackers

    def step(self, tower: str) -> Step | None:
        """The forward that a tower is in. Backward passes recompute in threads of their own, hence the latest."""
        tracker = self._trackers().get(tower) or self._latest.get(tower)
        return tracker.step if tracker else None

    # The calls

    def handle(
        self,
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
        """One attention call of one of this model's modules."""
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        held = dispatch.held(key)
        found = self._handle(module, (query, key, value, attention_mask), options, held)
        if held is not None:
            held.settle(module, query, attention_mask, **options)
        return found

    def _handle(
        self, module: nn.Module, arguments: tuple, options: dict[str, Any], held: dispatch.Held | None
    ) -> tuple[Tensor, Tensor | None]:
        """held: the layer of the cache, where it holds other keys for each head."""
        query, key, value, attention_mask = arguments
        dropout = options["dropout"]
        tower, layer = self.places[module]
        placed = self._placed((tower, layer))
        edits = placed.edits
        replayed = bool(placed.probes) and torch._C._current_graph_task_id() != -1
        probes = [] if replayed else placed.probes
        weights_probes = [p for p in probes if p.reads_weights]
        previous = dispatch.previous_function(module)
        if held is not None:
            previous = partial(held.attend, previous)
        step = self.step(tower)
        wants_weights = bool(options.get("output_attentions") or (step is not None and step.wants_weights))
        if not edits and not probes and not wants_weights:
            return previous(module, *arguments, **options)
        if dropout and (weights_probes or any(not isinstance(b.edit, OutputEdit) for b in edits)):
            raise ValueError(
                f"attention dropout is {dropout} and the model is in training mode: weights would not be those that "
                "the model used; call model.eval() or set attention_dropout to 0"
            )
        stands_in = dispatch.mechanism_of(module) is not None  # for the module's own attention
        blind = stands_in and dispatch.without_rows(module)
        if blind and (weights_probes or any(not isinstance(b.edit, OutputEdit) for b in edits)):
            wanted = [*weights_probes, *(b.edit for b in edits if not isinstance(b.edit, OutputEdit))][0]
            raise UnsupportedModel(
                f"{type(wanted).__name__}: layer {layer} runs a mechanism without one softmax over its keys, so its "
                "heads have no rows of weights; edits and probes of head outputs work there (ScaleHeads, Ablate of "
                "mode zero, mean or resample)"
            )
        # A paged cache reaches attention itself up to transformers 5.23; later only the places in it do.
        if options.get("cache") is not None or "read_index" in options:
            raise UnsupportedModel("continuous batching is not supported; call generate or the model itself")
        kind = self.kinds.get(tower, "causal")
        read = (key, value, attention_mask)
        if held is not None:
            outputs_only = all(isinstance(b.edit, OutputEdit) for b in edits) and not weights_probes
            read = held.expanded(query, *read, shapes_only=outputs_only and not wants_weights)
        seen = dispatch.seen(module, query, read[0], read[2]) if stands_in else read[2]
        call = read_call(
            module, query, read[0], read[1], seen, options["scaling"], options, kind, step, self.step("encoder")
        )
        call.tower, call.layer = tower, layer
        share = self._share(module, query.shape[1])
        if share is not None:
            call.heads = share.numbers(query.shape[1])
        gates = self._gates(module, arguments, options, edits) if stands_in else None
        if gates is not None:
            previous = dispatch.base_function(module)  # edits change what is gated
        plain = Plain(previous, module, arguments, options, own=held is None and not stands_in)
        if placed.uses_generated:
            self._refuse_moved_rows(call)
        self._thread.call = (module, call)
        out = attend(call, edits, weights_probes if share is None else [], plain)
        if gates is not None:
            out = out * gates[..., None].to(out.dtype)
        if share is not None and weights_probes:
            self._read_all_heads(call, edits, weights_probes, share)
        weights = plain.weights
        if wants_weights and not blind and (edits or weights is None):
            weights = self._all_weights(call, edits)
        return out, weights

    def _gates(self, module: nn.Module, arguments: tuple, options: dict, edits: list[BoundEdit]) -> Tensor | None:
        """The factors that a mechanism puts on the heads of ordinary attention, where edits must come before them."""
        gates = dispatch.gates_of(module)
        return None if gates is None or not edits else gates(module, *arguments, **options)

    def _share(self, module: nn.Module, local: int) -> HeadShare | None:
        """How a module's heads are shared among processes, of which this one holds `local`."""
        share = self.shares.get(module)
        total = attention_shape(module).heads if share is not None else local
        return share if share is not None and share.applies(local, total, type(module).__name__) else None

    def _read_all_heads(self, call: Call, edits: list[BoundEdit], probes: list[Probe], share: HeadShare) -> None:
        """Every rank reads all heads of the layer, so that probes see what they would see in one process."""
        differentiable = any(p.differentiable for p in probes)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            attend(gathered(call, share), edits, probes)

    def _placed(self, place: tuple[str, int]) -> "_Placed":
        """What is attached to a layer."""
        by_place = self._by_place  # another one as soon as something is opened or closed
        known = by_place.get(place)
        if known is None:
            edits = [b for c in self.contexts for b in c.edits if b.heads.get(place)]
            known = by_place[place] = _Placed(
                edits,
                [p for c in self.contexts for p in c.probes],
                any(group.uses_generated for b in edits for group in b.edit.key_groups()),
            )
        return known

    def _refuse_moved_rows(self, call: Call) -> None:
        """Beam search hands a row's cache to another row; groups of generated tokens would then be wrong."""
        marks = self._thread.__dict__.setdefault("marks", {})
        place, last = (call.tower, call.layer), call.step.total - 1 - call.key_offset
        before, marks[place] = marks.get(place), call.k[:, 0, last].clone()
        comparable = call.step.generating and last > 0 and before is not None and before.shape == marks[place].shape
        if comparable and before is not None and not torch.equal(before, call.k[:, 0, last - 1]):
            raise UnsupportedModel(
                "beam search moved rows of the cache, and an edit names a group of generated tokens; use a group of "
                "the prompt, or num_beams=1"
            )

    def _all_weights(self, call: Call, edits: list[BoundEdit]) -> Tensor:
        b, h, t, s = *call.q.shape[:3], call.k.shape[2]
        if not self._warned:
            self._warned = True
            size = b * h * t * s * call.q.element_size() * len(self.places) / 2**20
            warnings.warn(f"output_attentions=True keeps about {size:.0f} MiB of weights", stacklevel=2)
        kept = _Keep()
        attend(call, edits, [kept])
        return torch.cat(kept.rows, 2).to(call.q.dtype)

    def _mixed(self, module: nn.Module, projection: nn.Module):
        """A hook on the projection that mixes heads: outputs reach probes as the projection receives them."""

        def hook(_: nn.Module, args: tuple, mixed: Tensor) -> None:
            probes = [p for c in self.contexts for p in c.probes if p.reads_outputs]
            seen, call = getattr(self._thread, "call", (None, None))
            replayed = torch._C._current_graph_task_id() != -1 or dispatch.is_aside()
            if not probes or seen is not module or call is None or replayed:
                return
            z = args[0].detach()
            mixed = (mixed[0] if isinstance(mixed, tuple) else mixed).detach()
            rows = z.numel() // (call.q.shape[0] * call.q.shape[1] * call.v.shape[3])
            z = z.reshape(call.q.shape[0], rows, call.q.shape[1], call.v.shape[3])
            length, share = call.q.shape[2], self._share(module, call.q.shape[1])
            if share is not None:
                z = share.gather(z, 2)
                blank = call.q.new_empty(call.q.shape[0], z.shape[2], rows, call.q.shape[3])
                call = replace(call, q=blank, heads=list(range(z.shape[2])), memo={})
            if rows != length:  # the layer called attention once per image or window
                blank = call.q.new_empty(call.q.shape[0], call.q.shape[1], rows, call.q.shape[3])
                blank_step = Step.of(call.q.shape[0], rows, call.q.device)
                call = replace(
                    call, q=blank, k=blank, v=blank, mask=None, step=blank_step, key_step=blank_step, memo={}
                )
            reading = Reading(call)
            with torch.no_grad():
                reading.state["projection"] = head_writes(projection, call.q.shape[1])
                for p in probes:
                    p.output(z, mixed.reshape(z.shape[0], rows, -1), reading)

        return hook


class _Keep(Probe):
    """Keeps whole rows, for output_attentions."""

    def __init__(self):
        super().__init__(differentiable=True)
        self.rows: list[Tensor] = []

    def block(self, reading, block) -> None:
        pad = reading.call.k.shape[2] - block.weights.shape[-1]
        self.rows.append(torch.nn.functional.pad(block.weights, (0, pad)))
