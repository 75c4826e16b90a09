"""Attention sinks: tokens that receive much attention whatever they say.

Three ways to tell them, all of them one call of `find_sinks`:

    massive   phi(x_t) = max_{j in D} |x_tj| / RMS(x_t) > threshold, x_t the input of a layer, D a few fixed dimensions
    first     the first real token, which is the sink of most models
    received  the attention that a token receives (see `received_attention`)

phi never exceeds sqrt(hidden size), which it reaches where one dimension holds all there is.

Papers: headwise/papers/visual_attention_redistribution.py (Kang et al., ICLR 2025) for massive activations,
headwise/papers/attention_calibration.py (Yu et al., ICML 2024) for attention received.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.attend.addresses import pick_layers
from headwise.attend.groups import KeyGroup, positions
from headwise.attend.read import Probe, Reading, RowBlock
from headwise.attend.received import sink_limit
from headwise.hf.addresses import layout
from headwise.hf.inputs import as_inputs, frugal
from headwise.hf.session import probe
from headwise.hf.sites import record

__all__ = ["FoundSinks", "find_sink_dims", "find_sinks", "massive_values", "received_attention", "sink_dims_of"]

By = Literal["massive", "first", "received"]
Layers = slice | Sequence[int]

PUBLISHED = {"Llama-2-7B": (1415, 2533), "Llama-2-13B": (2100, 4743)}
"""The sink dimensions that were published, by the language model."""


@dataclass(frozen=True)
class FoundSinks:
    """What `find_sinks` found.

    members: `[b l s]`, True at the sinks of a layer; layers that were not looked at have none.
    values: `[b l s]` what was compared with `threshold` (phi, or attention received; nan where nothing was read).
    heads: `[b l h s]` where sinks differ from head to head, otherwise None.
    """

    by: str
    threshold: float
    members: Bool[Tensor, "b l s"]
    values: Float[Tensor, "b l s"]
    heads: Bool[Tensor, "b l h s"] | None = None

    def group(self, layer: int | None = None) -> KeyGroup:
        """The sinks of a layer, or of any layer, as a key group for these inputs."""
        return positions(self.members.any(1) if layer is None else self.members[:, layer])

    def __bool__(self) -> bool:
        return bool(self.members.any())


def massive_values(x: Float[Tensor, "... c"], dims: Iterable[int] | None = None) -> Float[Tensor, "..."]:
    """`max_j |x_j| / sqrt(mean(x^2) + 1e-6)` over the dimensions `dims`, in float32; None is all of them.

    Lies in 0..sqrt(c). x: the input of a layer, before its norm and without the norm's gain.

    >>> massive_values(torch.tensor([0.0, 3.0, 4.0, 0.0]))
    tensor(1.6000)
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = (work.square().mean(-1) + 1e-6).sqrt()
    chosen = work if dims is None else work[..., check_dims("massive_values", dims, x.shape[-1])]
    return chosen.abs().amax(-1) / rms


def find_sinks(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    by: By = "massive",
    threshold: float | None = None,
    dims: Iterable[int] | None = None,
    layers: Layers | None = None,
) -> FoundSinks:
    """The sinks of a batch, layer by layer, in one forward.

    inputs: token ids `[b, t]`, or what a tokenizer or processor returned (pictures included). Padding is never a sink.
    by, threshold, layers: ``massive``: phi above 20, from layer 2 on, as the paper has it; dims are the dimensions to
    look at, None all (`find_sink_dims` finds them, `sink_dims_of` knows the published ones). ``first``: the first real
    token, no threshold, all layers. ``received``: tokens to which some head gives a mean weight above 0.1 (between 0
    and 1), all layers; `heads` of the result tells which. Open edits act.

    Warns where threshold exceeds sqrt(hidden size): no token can pass it. Raises ValueError for an unknown way,
    dimensions or layers that the model has not, and a threshold that is not positive.
    """
    if by not in _FINDERS:
        raise ValueError(f"find_sinks: by is {by!r}; choose from {', '.join(_FINDERS)}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"find_sinks: threshold is {threshold}; it must be above 0")
    if dims is not None and by != "massive":
        raise ValueError(f"find_sinks: dims are those of massive activations; by is {by!r}")
    given = as_inputs(model, inputs)
    count = layout(model).main.layers
    chosen = pick_layers(slice(2, None) if layers is None and by == "massive" else layers, count, "find_sinks")
    return _FINDERS[by](model, given, threshold, dims, chosen)


def _massive(
    model: nn.Module, given: dict[str, Any], threshold: float | None, dims: Iterable[int] | None, layers: list[int]
) -> FoundSinks:
    threshold = 20.0 if threshold is None else threshold
    with torch.no_grad(), record(model, [f"residual:{layer}" for layer in layers]) as seen:
        model(**{**frugal(model), **given})
    real = _real(given)
    count = layout(model).main.layers
    values = torch.full((real.shape[0], count, real.shape[1]), torch.nan)
    warn_unreachable("find_sinks", threshold, seen[f"residual:{layers[0]}"].shape[-1])
    for layer in layers:
        stream = seen[f"residual:{layer}"]
        values[:, layer] = massive_values(stream, dims).float().cpu()
    return FoundSinks("massive", threshold, (values > threshold) & real[:, None], values)


def _first(
    model: nn.Module, given: dict[str, Any], threshold: float | None, dims: Iterable[int] | None, layers: list[int]
) -> FoundSinks:
    del dims
    if threshold is not None:
        raise ValueError(f"find_sinks: threshold is {threshold}, but the first token is a sink without one; leave it")
    real = _real(given)
    members = torch.zeros(real.shape[0], layout(model).main.layers, real.shape[1], dtype=torch.bool)
    first = torch.nn.functional.one_hot(real.int().argmax(-1), real.shape[1]).bool() & real
    members[:, layers] = first[:, None]
    return FoundSinks("first", math.nan, members, torch.full(members.shape, torch.nan))


def _by_received(
    model: nn.Module, given: dict[str, Any], threshold: float | None, dims: Iterable[int] | None, layers: list[int]
) -> FoundSinks:
    del dims
    limit = sink_limit("find_sinks", threshold, False)
    received = received_attention(model, given)
    rest = torch.ones(received.shape[1], dtype=torch.bool)
    rest[layers] = False
    received[:, rest] = torch.nan
    heads = received > limit  # false where nothing was read
    values = received.nan_to_num(-1).amax(2)
    return FoundSinks("received", limit, heads.any(2), values.masked_fill(values < 0, torch.nan), heads)


_FINDERS: dict[str, Callable[..., FoundSinks]] = {"massive": _massive, "first": _first, "received": _by_received}


def find_sink_dims(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    top: int = 2,
    layers: Layers | None = None,
) -> tuple[int, ...]:
    """The `top` dimensions in which the tokens that receive most attention are largest, for `find_sinks(dims=...)`.

    In every layer (from 2 on, where `layers` is None) and text, the token that receives most attention over all heads
    is taken; of those tokens |x_j| / RMS(x) is averaged, and the largest are returned, ascending. Such dimensions are
    there in every model; whether they hold massive activations is what the threshold of `find_sinks` decides.
    """
    given = as_inputs(model, inputs)
    chosen = pick_layers(slice(2, None) if layers is None else layers, layout(model).main.layers, "find_sink_dims")
    sites = [f"residual:{layer}" for layer in chosen]
    with record(model, sites) as seen:
        received = received_attention(model, given)
    total = 0.0
    for layer in chosen:
        x = seen[f"residual:{layer}"].float()
        token = received[:, layer].nan_to_num(-1).mean(1).argmax(-1).to(x.device)
        x = x.gather(1, token[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
        total = total + (x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).mean(0)
    assert isinstance(total, Tensor)  # pick_layers gives one layer or more
    if not 1 <= top <= len(total):
        raise ValueError(f"find_sink_dims: top is {top}; choose 1 to the hidden size {len(total)}")
    return tuple(sorted(total.topk(top).indices.tolist()))


def sink_dims_of(name: str) -> tuple[int, ...]:
    """The published sink dimensions of a language model: Llama-2-7B and Llama-2-13B. Raises ValueError for others."""
    found = next((dims for known, dims in PUBLISHED.items() if known.lower() in name.lower()), None)
    if found is None:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"sink_dims_of: none are published for {name!r} (only {known}); use find_sink_dims")
    return found


def received_attention(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Float[Tensor, "b l h s"]:
    """The mean attention that every token receives from the real rows that can see it, head by head, in one forward.

    s_k = sum_q A[q, k] / #{q that see k}; nan at padding and for heads that a layer has not.
    """
    given = as_inputs(model, inputs)
    real, main = _real(given), layout(model).main
    reader = _Received()
    with torch.no_grad(), probe(model, reader):
        model(**{**frugal(model), **given})
    table = torch.full((real.shape[0], main.layers, max(main.heads), real.shape[1]), torch.nan)
    for (tower, layer), received in reader.found.items():
        if tower == main.name:
            table[:, layer, : received.shape[1]] = received.float().cpu()
    return table.masked_fill(~real[:, None, None], torch.nan)


class _Received(Probe):
    """Column means of the weights of real rows, per text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], Float[Tensor, "b h s"]] = {}

    def block(self, reading: Reading, block: RowBlock) -> None:
        call = reading.call
        sums = reading.state.setdefault(
            "received",
            torch.zeros(*call.q.shape[:2], call.k.shape[2], dtype=torch.float64, device=call.q.device),
        )
        rows = call.real_rows[:, block.index].to(block.weights.dtype)
        sums[..., : block.weights.shape[-1]] += torch.einsum("br,bhrs->bhs", rows, block.weights)

    def finish(self, reading: Reading) -> None:
        call = reading.call
        rows = call.real_rows.double()
        if call.kind == "causal":  # rows from the token itself on
            count = rows.flip(-1).cumsum(-1).flip(-1)
        else:
            count = rows.sum(-1, keepdim=True).expand(-1, call.k.shape[2])
        self.found[call.tower, call.layer] = reading.state["received"] / count.clamp_min(1)[:, None]


def warn_unreachable(where: str, threshold: float, hidden: int, name: str = "threshold") -> None:
    """Warn where no token of this hidden size can pass a threshold of phi."""
    if threshold > math.sqrt(hidden):
        warnings.warn(
            f"{where}: {name} is {threshold:g}, but with a hidden size of {hidden} no token can pass "
            f"sqrt({hidden}) = {math.sqrt(hidden):.1f}: nothing can be a sink; give a lower threshold",
            stacklevel=3,
        )


def check_dims(where: str, dims: Iterable[int], hidden: int) -> list[int]:
    """Dimensions as a list. Raises ValueError for none, and for those that the hidden size does not have."""
    chosen = [int(dim) for dim in dims]
    wrong = [dim for dim in chosen if not 0 <= dim < hidden]
    if wrong or not chosen:
        what = f"dimension {wrong[0]} is out of range" if wrong else "dims is empty"
        raise ValueError(f"{where}: {what}; the hidden size is {hidden}, so 0 to {hidden - 1}")
    return chosen


def _real(given: Mapping[str, Any]) -> Bool[Tensor, "b s"]:
    mask = given.get("attention_mask")
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(tokens, Tensor):
        raise ValueError(f"find_sinks: inputs hold {', '.join(given)}; give token ids as input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool().cpu()
    return torch.ones(tokens.shape[:2], dtype=torch.bool)
