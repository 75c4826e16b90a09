"""Which heads carry a behaviour: put what a node put out on a counterfactual prompt in its place, and look.

Activation patching asks what changes when everything behind the node responds; path patching what changes along one
direct path, from a sender to the logits or to the queries, keys or values of chosen heads, all other heads frozen.

    effect_s = metric(clean prompt, s as on the corrupt prompt) - metric(clean prompt)

Cost: where only the last position is patched and read, one token a sender on the prompt's cache, hundreds of senders in
one forward; with all heads frozen not even a cache is needed. Otherwise one whole forward a sender, several in a batch.

Paper: headwise/papers/circuit_component_reuse.py (Merullo et al., ICLR 2024), after Wang et al. (2022).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attend.addresses import Head, Layout
from headwise.heads._patch_runs import Group, Inputs, Prompts, Runs
from headwise.heads.attribution import Tail
from headwise.heads.decoding import arguments
from headwise.heads.effects import (
    Metric,
    Node,
    NodeEffects,
    Receiver,
    centred_logit,
    log_probability,
    logit_difference,
    parse_nodes,
    probability,
)
from headwise.hf.addresses import unwrap
from headwise.hf.inputs import takes
from headwise.hf.sites import find_sites, replace

__all__ = ["activation_patch", "attribution_patch", "path_patch"]

# Metrics are written once, in effects; they are used with these functions.
_METRICS = (centred_logit, log_probability, logit_difference, probability)

Progress = Callable[[int, int, str], None]
Implementation = Literal["auto", "reference"]
Position = int | Tensor | None


def activation_patch(
    model: nn.Module,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    nodes: Iterable[Node] | None = None,
    position: Position = -1,
    position_of_metric: int = -1,
    implementation: Implementation = "auto",
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> NodeEffects:
    """Total effect of each node: its output is that of the corrupt run, and everything behind it responds.

    clean, corrupt: token ids `[b, t]` of one shape, or a tokenizer's output padded on the left. metric: of the logits
    at `position_of_metric` (`logit_difference`, ... or your own `[... b v] -> [... b]`). nodes: heads ("9.6") and MLPs
    ("mlp:3"); None means all heads. position: where outputs are replaced: a column, one for each prompt, or None for
    all of them.
    implementation: "reference" runs the whole sequence once a node; "auto" gives the same numbers, faster.
    batch_tokens: tokens of one forward. progress: called with senders done, senders in all, and what is being done.

    Raises ValueError for prompts that do not correspond, unknown or doubled nodes and positions out of range;
    UnsupportedModel for models whose residual stream or heads cannot be told.
    """
    where = "activation_patch"
    prompts = Prompts.of(where, model, clean, corrupt)
    slow = _is_reference(where, implementation)
    runs = Runs(
        where, model, prompts, position=position, at=position_of_metric, one_by_one=slow, batch_tokens=batch_tokens
    )
    heads, mlps = _nodes(where, runs, nodes, runs.layout)
    return _effects(runs, metric, heads, mlps, progress, {"how": "activation patching", "position": _told(position)})


def path_patch(
    model: nn.Module,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    receivers: str | Receiver | Iterable[str | Receiver] = "logits",
    senders: Iterable[Node] | None = None,
    position: Position = -1,
    position_of_metric: int = -1,
    freeze: Sequence[str] = ("heads",),
    implementation: Implementation = "auto",
    batch_tokens: int = 16384,
    progress: Progress | None = None,
) -> NodeEffects:
    """Direct effect of each sender along the paths to the receivers, by Wang et al.'s runs.

    1. Clean and corrupt prompts are run, and the outputs of all heads kept.
    2. The clean prompt is run with every head frozen to its clean output, the sender to its corrupt one; what the
       receivers would read is noted. MLPs respond, unless `freeze` names "mlps" too.
    3. The clean prompt is run with the receivers reading that, everything else free, and the metric is taken.

    receivers: "logits" (step 3 is then step 2's own logits), or any of "9.6.q", "9.6.k", "9.6.v" and "mlp:3", patched
    together. Keys and values belong to key heads: with grouped keys the whole group reads the patched ones. They are
    taken where attention takes them, after rotary embedding and cache.
    senders: None means all heads that come before the last receiver. position: where the sender is patched. Heads are
    frozen everywhere, so a sender patched before the last column has no direct path to the last column's logits.
    freeze: ("heads",), ("heads", "mlps"), or ("heads", "mlps", "norm"): the last is for receivers="logits" and keeps
    the final norm's scale, which makes effects linear: they are differences of `logit_attribution`.
    Other arguments and errors as in `activation_patch`; ValueError as well for a sender behind all receivers.

    >>> effects = path_patch(model, ids, twins, logit_difference(right, wrong))  # doctest: +SKIP
    >>> effects.map().top(k=3)  # doctest: +SKIP

    Notes: the official code freezes heads at the chosen position only; for the last position that is the same. It
    reports -100 times `effects.map()`.
    """
    where = "path_patch"
    prompts = Prompts.of(where, model, clean, corrupt)
    ends = _receivers(where, receivers)
    frozen = _freeze(where, freeze, ends)
    runs = Runs(
        where,
        model,
        prompts,
        position=position,
        at=position_of_metric,
        freeze=frozen,
        receivers=ends,
        one_by_one=_is_reference(where, implementation),
        batch_tokens=batch_tokens,
    )
    for end in ends:
        if end.head is not None:
            runs.layout.check(end.head)
        elif end.layer is not None and end.layer not in runs.feeding:
            raise ValueError(f"{where}: receiver {end} but the model's MLPs are in layers {_span(runs.feeding)}")
    depth = max((end.depth for end in ends), default=float("inf"))
    heads, mlps = _nodes(where, runs, senders, runs.layout)
    behind = [str(head) for head in heads if not head.layer < depth]
    behind += [f"mlp:{layer}" for layer in mlps if not layer + 0.5 < depth]
    if behind and senders is not None:
        raise ValueError(
            f"{where}: sender {behind[0]} lies behind the receivers ({', '.join(map(str, ends))}), so no path leads "
            "from it to them; give senders of earlier layers"
        )
    heads = [head for head in heads if head.layer < depth]
    if not heads and not mlps:
        raise ValueError(f"{where}: no head comes before {', '.join(map(str, ends))}; give receivers of later layers")
    about = {
        "how": "path patching",
        "receivers": [str(end) for end in ends] or ["logits"],
        "freeze": list(frozen),
        "position": _told(position),
    }
    return _effects(runs, metric, heads, mlps, progress, about)


def attribution_patch(
    model: nn.Module,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    *,
    nodes: Iterable[Node] | None = None,
    position: Position = -1,
    position_of_metric: int = -1,
) -> NodeEffects:
    """A first estimate of `activation_patch` for all nodes at once, from one backward pass.

        effect = sum over patched positions of (corrupt output - clean output) . d metric / d output

    It is the first order of the total effect: right for small differences, wrong in size and sometimes in sign where a
    softmax or a norm saturates. Arguments and errors as in `activation_patch`.
    """
    where = "attribution_patch"
    prompts = Prompts.of(where, model, clean, corrupt)
    runs = Runs(where, model, prompts, position=position, at=position_of_metric, one_by_one=True)
    heads, mlps = _nodes(where, runs, nodes, runs.layout)
    with runs:
        clean_values, corrupt_values = runs.clean, runs.corrupt
    assert clean_values.logits is not None and corrupt_values.logits is not None
    shifts = {f"heads:{layer}": torch.zeros_like(value) for layer, value in clean_values.heads.items()}
    shifts |= {f"mlp:{layer}": torch.zeros_like(clean_values.mlps[layer]) for layer in mlps}
    for shift in shifts.values():
        shift.requires_grad_()
    given = arguments(model, prompts.clean, prompts.real)
    if takes(unwrap(model), "use_cache"):
        given["use_cache"] = False
    with torch.enable_grad(), replace(model, {site: _shifted(shift) for site, shift in shifts.items()}):
        logits = model(**given).logits[:, runs.at]
        total = metric(logits).sum()
    slopes = dict(zip(shifts, torch.autograd.grad(total, list(shifts.values())), strict=True))
    mask = runs._mask
    table, fed = _tables(runs.layout, len(prompts.clean), heads, mlps)

    def product(other: Tensor, own: Tensor, slope: Tensor) -> Tensor:
        each = ((other - own) * slope).sum(-1)
        return (each if mask is None else each * mask).sum(1).float().cpu()

    for head in heads:
        slope = slopes[f"heads:{head.layer}"][:, :, head.head]
        own, other = (values.heads[head.layer][:, :, head.head] for values in (clean_values, corrupt_values))
        table[:, head.layer, head.head] = product(other, own, slope)
    for layer in mlps:
        assert fed is not None
        fed[:, layer] = product(corrupt_values.mlps[layer], clean_values.mlps[layer], slopes[f"mlp:{layer}"])
    with torch.no_grad():
        before, after = (metric(values.logits).float().cpu() for values in (clean_values, corrupt_values))
    about = {"how": "attribution patching", "position": _told(position)}
    return NodeEffects(table, fed, before, after, runs.layout, _name(model), about)


def _shifted(shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value + shift.view_as(value)


def _effects(
    runs: Runs,
    metric: Metric,
    heads: list[Head],
    mlps: list[int],
    progress: Progress | None,
    about: dict,
) -> NodeEffects:
    groups: list[Group] = [((), ()), *(([head], []) for head in heads), *(([], [layer]) for layer in mlps)]
    table, fed = _tables(runs.layout, len(runs.prompts.clean), heads, mlps)
    with runs:
        assert runs.clean.logits is not None and runs.corrupt.logits is not None
        tail = None
        if "norm" in runs.freeze:
            assert runs.clean.final is not None
            tail = Tail.of(runs.model, find_sites(runs.model), runs.clean.final[:, -1], runs.clean.logits)
        values = []
        for start, logits, final in runs.run(groups):
            if tail is not None:
                assert final is not None
                logits = tail.linear(final)
            values.append(_measured(metric, logits))
            if progress is not None:
                progress(min(start + len(logits), len(groups)) - 1, len(groups) - 1, "patching")
        found = torch.cat(values) - values[0][0]
        # A node that says the same on both prompts changes nothing; batches of other sizes may round otherwise.
        changed = torch.stack([runs.changed(group) for group in groups])
        found = found * changed
        before, after = (_measured(metric, logits) for logits in (runs.clean.logits, runs.corrupt.logits))
    for number, head in enumerate(heads, 1):
        table[:, head.layer, head.head] = found[number]
    for number, layer in enumerate(mlps, 1 + len(heads)):
        assert fed is not None
        fed[:, layer] = found[number]
    return NodeEffects(table, fed, before, after, runs.layout, _name(runs.model), about | {"way": runs.way})


def _measured(metric: Metric, logits: Tensor) -> Tensor:
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:-1]:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"metric: gave {came} for logits {tuple(logits.shape)}; expected one number for each prompt, "
            f"{tuple(logits.shape[:-1])}"
        )
    return value.detach().float().cpu()


def _tables(
    layout: Layout, b: int, heads: list[Head], mlps: list[int]
) -> tuple[Float[Tensor, "b l h"], Float[Tensor, "b l"] | None]:
    del heads
    main = layout.main
    table = torch.full((b, main.layers, max(main.heads)), torch.nan)
    return table, torch.full((b, main.layers), torch.nan) if mlps else None


def _nodes(where: str, runs: Runs, nodes: Iterable[Node] | None, layout: Layout) -> tuple[list[Head], list[int]]:
    heads, mlps = (layout.heads(), []) if nodes is None else parse_nodes(where, nodes, layout)
    if not heads and not mlps:
        raise ValueError(f"{where}: there are no nodes; give heads such as '9.6' or MLPs such as 'mlp:3'")
    if missing := [layer for layer in mlps if layer not in runs.feeding]:
        raise ValueError(f"{where}: mlp:{missing[0]} but the model's MLPs are in layers {_span(runs.feeding)}")
    return heads, mlps


def _receivers(where: str, given: str | Receiver | Iterable[str | Receiver]) -> list[Receiver]:
    """The receivers; none for the logits."""
    parsed = [Receiver.parse(one) for one in ([given] if isinstance(given, str | Receiver) else given)]
    if not parsed:
        raise ValueError(f"{where}: receivers is empty; give 'logits', or such as '9.6.q'")
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"{where}: a receiver is given twice in {', '.join(map(str, parsed))}")
    if any(one.part == "logits" for one in parsed):
        if len(parsed) > 1:
            raise ValueError(f"{where}: receivers are {', '.join(map(str, parsed))}; the logits go with no other")
        return []
    return parsed


def _freeze(where: str, freeze: Sequence[str], receivers: list[Receiver]) -> tuple[str, ...]:
    given = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    if given not in (("heads",), ("heads", "mlps"), ("heads", "mlps", "norm")):
        raise ValueError(
            f"{where}: freeze is {given}; choose ('heads',), ('heads', 'mlps') or ('heads', 'mlps', 'norm')"
        )
    if "norm" in given and receivers:
        raise ValueError(f"{where}: the final norm can be frozen only for receivers='logits'")
    return given


def _is_reference(where: str, implementation: str) -> bool:
    if implementation not in ("auto", "reference"):
        raise ValueError(f"{where}: implementation is {implementation!r}; choose auto or reference")
    return implementation == "reference"


def _told(position: Position) -> int | str | list[int]:
    return "all" if position is None else position.tolist() if isinstance(position, Tensor) else position


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]}" if layers else "none"


def _name(model: nn.Module) -> str:
    return str(getattr(unwrap(model).config, "name_or_path", ""))
