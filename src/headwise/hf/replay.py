"""Run a model again without what has been computed already: modules that hand back a kept output instead of running.

The model's own forward does the rest, so nothing of an architecture is copied: its masks, positions, norms, logit caps
and scales are its own. What a module returned is kept as it left its `forward`, before any hook on the module.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from headwise.hf.addresses import unwrap
from headwise.hf.inputs import takes

# `replay` is taken from this module: an area exports no name that one of its modules has.
__all__ = ["Kept", "backbone", "keep_output", "row_logits"]


class Kept:
    """The output of the last call of a module; `value` is None before the first."""

    value: Any = None


@contextmanager
def keep_output(module: nn.Module) -> Iterator[Kept]:
    """Keep what the module returns inside the block: a copy, because some families change the stream in place."""
    kept, run = Kept(), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        kept.value = _copied(output)
        return output

    with _instead(module, forward):
        yield kept


@contextmanager
def replay(modules: Iterable[nn.Module], output: Any) -> Iterator[None]:
    """Inside the block the modules return `output` and compute nothing."""
    chosen = list(modules)

    def forward(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return _copied(output)

    if not chosen:
        yield
        return
    with _instead(chosen[0], forward), replay(chosen[1:], output):
        yield


def backbone(model: nn.Module) -> PreTrainedModel | None:
    """The part of a language model below its unembedding; None where the two cannot be told apart."""
    inner = unwrap(model)
    below = inner.base_model
    has_logits = inner.get_output_embeddings() is not None and takes(inner, "logits_to_keep")
    return below if below is not inner and isinstance(below, PreTrainedModel) and has_logits else None


def row_logits(
    model: nn.Module, output: Any, stream: Float[Tensor, "n c"], rows: int
) -> Iterator[Float[Tensor, "r v"]]:
    """Logits of rows of the stream that `backbone(model)` returned, `rows` at a time, by the model's own forward.

    output: what the backbone returned. Only `rows` times the vocabulary is ever held.
    """
    inner, below = unwrap(model), backbone(model)
    if below is None:
        raise ValueError(f"row_logits: {type(inner).__name__} has no backbone apart from its logits")
    for part in stream.split(rows):
        ids: Int[Tensor, "1 r"] = torch.zeros(1, len(part), dtype=torch.long, device=part.device)
        with replay([below], _with_stream(output, part[None])):
            yield inner(input_ids=ids, use_cache=False, logits_to_keep=0).logits[0]


def _with_stream(output: Any, stream: Tensor) -> Any:
    if isinstance(output, ModelOutput):
        changed = copy.copy(output)
        changed["last_hidden_state"] = stream
        return changed
    return (stream, *output[1:])


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) in (tuple, list):
        return type(output)(item.clone() if isinstance(item, Tensor) else item for item in output)
    return output


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow a module's forward; one that stood on the object itself (offloading does that) comes back at the end."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
