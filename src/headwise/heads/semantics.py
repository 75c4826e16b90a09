"""How far each head stands from the semantic centre of its layer, by what it reads of a text: Task-KV's measure.

Task-KV makes its split anew for each prompt (`memory.TaskKVCache(model)`). As a head map the distances can be looked at
beside other scores, and a fixed split made of them: `TaskKVCache(model, full_heads=found.top("semantic-distance", 8))`.

Paper: headwise/papers/task_kv.py (He, Liu, Chen, 2025).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attend.addresses import Head
from headwise.attend.head_map import HeadMap
from headwise.attend.read import Probe, Reading
from headwise.errors import UnsupportedModel
from headwise.hf.addresses import layout, tower_kinds
from headwise.hf.inputs import as_inputs
from headwise.hf.session import probe
from headwise.ops.observation import head_distance, semantic_vectors

__all__ = ["semantic_distances"]


class _Distances(Probe):
    """Keeps of each text the distance of every head of the main tower; query heads of a key head share one."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self.runs: list[dict[Head, float]] = []
        self.start = 0

    def begin(self) -> None:
        self.start = len(self.runs)

    def sparse(self, reading: Reading) -> None:
        call = reading.call
        if call.tower:
            return
        real = None if bool(call.real_columns.all()) else call.real_columns
        vectors = semantic_vectors(
            call.q, call.k, call.v, scale=call.scale, softcap=call.softcap, real=real, **self.options
        )
        for row, distances in enumerate(head_distance(vectors).repeat_interleave(call.groups, 1).tolist()):
            if len(self.runs) <= self.start + row:
                self.runs.append({})
            run = self.runs[self.start + row]
            run.update({Head(call.layer, head): distance for head, distance in enumerate(distances)})


def semantic_distances(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any] | Tensor],
    *,
    window: int = 32,
    top: int | None = 256,
    pool: int = 7,
    normalize: bool = False,
) -> HeadMap:
    """`semantic-distance` of every head: `||v_j - mean over heads of v||`, the mean over texts; each text is a run.

    inputs: token ids `[b t]`, what a tokenizer returned, or several of these; pad on the left. The other arguments are
    those of `ops.semantic_vectors`. Distances are not comparable between layers whose values differ in size.
    Raises UnsupportedModel for a model without a causal text decoder, ValueError for no input.
    """
    if tower_kinds(model).get("") != "causal":
        raise UnsupportedModel("semantic_distances: the model has no causal text decoder, whose last queries it needs")
    batches: list[Any] = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not batches:
        raise ValueError("semantic_distances: no inputs were given; give token ids or a tokenized text")
    reader = _Distances({"window": window, "top": top, "pool": pool, "normalize": normalize})
    with torch.no_grad(), probe(model, reader):
        for batch in batches:
            reader.begin()
            model(**as_inputs(model, batch))
    return HeadMap({}, layout(model), runs={"semantic-distance": reader.runs})
