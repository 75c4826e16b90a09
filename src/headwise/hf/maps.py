"""Raw attention maps and outputs of chosen heads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.attend.addresses import Head, select_heads
from headwise.attend.probes import HeadOutputs
from headwise.attend.read import Probe, Reading
from headwise.hf.addresses import layout
from headwise.hf.inputs import as_inputs
from headwise.hf.session import probe

__all__ = ["attention_maps", "head_outputs", "maps_during"]


class _Maps(Probe):
    """Keeps rows of weights of some heads, for every call of their layers."""

    def __init__(self, heads: Iterable[Head], rows: Sequence[int] | None, differentiable: bool):
        super().__init__(differentiable=differentiable)
        self.rows = rows
        self.calls: dict[Head, list[Tensor]] = {head: [] for head in heads}
        self.repeated = False
        self.places: dict[tuple[str, int], list[Head]] = {}
        for head in self.calls:
            self.places.setdefault((head.tower, head.layer), []).append(head)

    def sparse(self, reading: Reading) -> None:
        wanted = self.places.get((reading.call.tower, reading.call.layer), [])
        if not wanted:
            return
        weights = torch.cat([block.weights for block in reading.blocks(trim=False)], 2)
        if self.rows is not None:
            weights = weights[:, :, _checked(self.rows, weights.shape[2])]
        # A tower that attends once per image or window tells nothing of its tokens; a layer that is used at several
        # depths is called on the same known tokens again.
        self.repeated |= bool(self.calls[wanted[0]]) and bool((reading.call.step.ids >= 0).any())
        for head in wanted:
            self.calls[head].append(weights[:, head.head])


def attention_maps(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    heads: str | Iterable[Head | str] | None = None,
    rows: Sequence[int] | None = None,
    *,
    differentiable: bool = False,
) -> Float[Tensor, "b h t s"]:
    """The attention weights of chosen heads in one forward, edits included.

    inputs: token ids `[b, t]`, or what a tokenizer or processor returned. heads: a selection such as "3.*" or "all",
    or heads; None means every head of the main tower. rows: positions of the queries, negative ones from the end; None
    means all of them. Memory is `b * h * t * s` numbers; padding and rows that see nothing are 0.

    Raises ValueError for heads and rows that are not there, and for heads whose maps differ in shape (of two towers).
    """
    chosen = select_heads(heads, layout(model))
    given = as_inputs(model, inputs)
    found = maps_during(model, lambda: model(**given), chosen, rows, differentiable=differentiable)
    maps = [found[head] for head in chosen]
    shapes = {tuple(m.shape) for m in maps}
    if len(shapes) > 1:
        raise ValueError(
            f"attention_maps: maps of these heads have different shapes {sorted(shapes)}; ask for one tower at a time"
        )
    return torch.stack([m.to(maps[0].device) for m in maps], 1)


def maps_during(
    model: nn.Module,
    run: Callable[[], Any],
    heads: Iterable[Head],
    rows: Sequence[int] | None = None,
    *,
    differentiable: bool = False,
) -> dict[Head, Float[Tensor, "b t s"]]:
    """The attention weights of heads while `run` calls the model, once."""
    kept = _Maps(heads, None if rows is None else [int(row) for row in rows], differentiable)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), probe(model, kept):
        run()
    if kept.repeated:
        raise ValueError(
            f"attention_maps: {type(model).__name__} uses one layer at several depths, so a head has several maps; "
            "read them with a probe of your own (headwise.attend.Probe), which sees every call"
        )
    return {head: _joined(head, calls) for head, calls in kept.calls.items()}


def head_outputs(model: nn.Module, inputs: Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> HeadOutputs:
    """What every head puts out on some inputs, for ablation by mean or by resampling.

    inputs: as for `attention_maps`, or several of them: means are then over the real tokens of all.
    """
    batches: list[Any] = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not batches:
        raise ValueError("head_outputs: no inputs were given; give token ids or a tokenized text")
    outputs = HeadOutputs()
    with torch.no_grad(), probe(model, outputs):
        for batch in batches:
            model(**as_inputs(model, batch))
    return outputs


def _joined(head: Head, calls: list[Tensor]) -> Tensor:
    """`[b t s]` of one head. A layer that attends once per image or window gives a map of blocks on the diagonal."""
    if not calls:
        raise ValueError(
            f"attention_maps: head {head} was not called on these inputs; a vision tower needs pixel values, an audio "
            "tower features"
        )
    if len(calls) == 1:
        return calls[0]
    if any(call.shape[0] != 1 or call.shape[1] != call.shape[2] for call in calls):
        raise ValueError(
            f"attention_maps: the layer of head {head} was called {len(calls)} times in this forward; give all rows of "
            "one item at a time"
        )
    return torch.block_diag(*(call[0] for call in calls))[None]


def _checked(rows: Sequence[int], count: int) -> list[int]:
    outside = [row for row in rows if not -count <= row < count]
    if outside:
        raise ValueError(f"attention_maps: row {outside[0]} is out of range; there are {count} rows (0 to {count - 1})")
    return list(rows)
