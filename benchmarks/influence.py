"""Scoring documents by attention influence: time of a corpus of short documents, as a ratio to two forwards a batch.

Every variant scores the same documents under the same model with the same heads attending evenly. The least ratio that
running 2 L - f layers instead of 2 L can give stands in the name of the input.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from benchmarks import Benchmark, Variant, setting
from headwise.attend.edits import Ablate
from headwise.heads.influence import attention_influence, by_length
from headwise.hf.session import steer

LAYERS, VOCABULARY, DOCUMENTS, BUDGET = 12, 4096, 20, 2048
BELOW = (4, 8)  # layers below the first masked head


@cache
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    made: Any = LlamaForCausalLM(config).eval()
    return made.to(setting.device, getattr(torch, setting.dtype))


@cache
def documents() -> list[torch.Tensor]:
    """Lengths as short web texts have them: most below a hundred tokens, a few of several hundred."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(DOCUMENTS, generator=generator) * 0.8 + 4.0).exp().clamp(8, 512).long().tolist()
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]


def heads(below: int) -> list[str]:
    """Six heads, the paper's 5 %, the lowest in layer `below`."""
    return [f"{layer}.{head}" for layer in (below, LAYERS - 2, LAYERS - 1) for head in (0, 1)]


def shared(below: int) -> Callable[[], Any]:
    return lambda: attention_influence(model(), documents(), heads(below), batch_tokens=BUDGET).scores


def two_forwards(below: int) -> Callable[[], Any]:
    """The same batches, padded, and the loss in chunks of rows: what a careful script does."""

    @torch.no_grad()
    def losses(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(setting.device)
        stream = model().model(input_ids=ids, use_cache=False).last_hidden_state
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, document in enumerate(batch):
            real[row, 1 : len(document)] = True
        rows, target = stream[:, :-1][real[:, 1:]], ids[real]
        parts = zip(rows.split(512), target.split(512), strict=True)
        found = torch.cat(
            [nn.functional.cross_entropy(model().lm_head(x).float(), y, reduction="none") for x, y in parts]
        )
        return [one.double().mean() for one in found.split([len(document) - 1 for document in batch])]

    def run() -> Any:
        scores = torch.zeros(DOCUMENTS, dtype=torch.float64)
        for batch in by_length(list(enumerate(documents())), BUDGET):
            base = losses([ids for _, ids in batch])
            with steer(model(), Ablate(heads(below), mode="uniform")):
                masked = losses([ids for _, ids in batch])
            for (number, _), one, other in zip(batch, base, masked, strict=True):
                scores[number] = (other - one) / one
        return scores

    return run


def one_by_one(below: int) -> Callable[[], Any]:
    """A document at a time with the model's own loss: the script that people write."""

    @torch.no_grad()
    def loss(ids: torch.Tensor) -> torch.Tensor:
        given = ids[None].to(setting.device)
        return model()(input_ids=given, labels=given).loss.double()

    def run() -> Any:
        base = torch.stack([loss(ids) for ids in documents()])
        with steer(model(), Ablate(heads(below), mode="uniform")):
            masked = torch.stack([loss(ids) for ids in documents()])
        return ((masked - base) / base).cpu()

    return run


def variants(below: int) -> list[Variant]:
    return [
        Variant("two forwards, same batches", partial(two_forwards, below)),
        Variant("headwise, shared prefix", partial(shared, below)),
        Variant("one document at a time", partial(one_by_one, below)),
    ]


def name_of(below: int) -> str:
    return f"{below} of {LAYERS} layers below, at best {(2 * LAYERS - below) / (2 * LAYERS):.3f}"


def check() -> None:
    """The three give the same scores."""
    bound = 1e-4 if setting.dtype == "float32" else 5e-2
    for below in BELOW:
        reference = one_by_one(below)()
        for other in (two_forwards(below)(), shared(below)()):
            torch.testing.assert_close(other, reference, rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    return Benchmark("influence", {name_of(below): partial(variants, below) for below in BELOW}, check, rounds=5)
