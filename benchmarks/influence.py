"""Scoring documents by attention influence: time of a corpus, as a ratio to a script that takes a document at a time.

Every variant scores the same documents under the same model with the same heads attending evenly: the shipped prose
under the text specimen, and documents as short as web texts often are under a Llama of twelve layers. A model of L
layers, f of them below the first masked one, runs 2 L - f layers and its unembedding twice; the name of an input says
what share of two forwards that is, in products of weights.

What to expect: on one thread of a CPU both sides are bound by matrix products. Of our time (torch.profiler, the text
specimen) products are 59 to 62 %, the model's own attention 17 to 20 %, the softmax of the losses 4 to 6 %; of the
script's, products are 58 % on the prose and 70 % on the Llama. Tokens that are run as padding are 5 to 7 % of those
that count. So the ratio is the share in the input's name, times what products gain by holding several documents' rows
and layers by being started once for them: 0.6 to 0.85, more where documents are long and fill a product by themselves.
In CPU seconds of two passes on a busy machine the script took 1.5 to 2.0 times as long as headwise on the prose, 1.5 to
1.8 with four layers below and 1.7 to 2.0 with eight. The aim of 1.8 is not met with four: of 1.68 s of the script 1.18
are products (71 GFLOP/s, ours 79) and 0.19 attention, so that 0.85 of the products and 0.83 of the attention alone
take 1.06 s, which allows 1.6; with eight layers below the same sum allows 1.9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import headwise
from benchmarks import Benchmark, Variant, setting
from headwise.attend.edits import Ablate
from headwise.heads.influence import attention_influence, batch_cost, by_length
from headwise.hf.session import steer

LAYERS, VOCABULARY, DOCUMENTS, BUDGET = 12, 4096, 64, 8192
BELOW = (4, 8)  # layers below the first masked head of the Llama
TEXT_HEADS: list[str] = ["2.4", "2.5"]  # of the text specimen: its retrieval heads


@cache
def llama() -> Any:
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
def specimen() -> Any:
    from headwise.specimens.registry import load_specimen

    found = load_specimen("text")
    return found.model.eval().to(setting.device, getattr(torch, setting.dtype)), found.tokenizer


@cache
def web_like() -> list[torch.Tensor]:
    """Lengths as short web texts have them: most below a hundred tokens, a few of several hundred."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(DOCUMENTS, generator=generator) * 0.8 + 4.0).exp().clamp(8, 512).long().tolist()
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in lengths]


@cache
def paragraphs() -> list[torch.Tensor]:
    """The shipped prose, a paragraph a document: 4 to some two hundred tokens."""
    folder = Path(headwise.__file__).parent / "specimens" / "corpus"
    texts = [part for path in sorted(folder.glob("*.txt")) for part in path.read_text("utf-8").split("\n\n")]
    found = specimen()[1]([" ".join(text.split()) for text in texts if text.strip()])["input_ids"]
    return [torch.tensor(ids) for ids in found if len(ids) > 1]


class Work:
    """What an input is: a model, documents and the heads that are masked."""

    def __init__(self, below: int | None) -> None:
        if below is None:
            self.model, self.documents, self.heads = specimen()[0], paragraphs(), TEXT_HEADS
        else:  # six heads, the paper's 5 %, the lowest in layer `below`
            self.model, self.documents = llama(), web_like()
            self.heads = [f"{layer}.{head}" for layer in (below, LAYERS - 2, LAYERS - 1) for head in (0, 1)]

    def scores(self, base: list[torch.Tensor], masked: list[torch.Tensor]) -> Any:
        plain, other = torch.stack(base).double(), torch.stack(masked).double()
        return ((other - plain) / plain).cpu()


def shared(below: int | None) -> Callable[[], Any]:
    work = Work(below)
    return lambda: attention_influence(work.model, work.documents, work.heads, batch_tokens=BUDGET).scores


def two_forwards(below: int | None) -> Callable[[], Any]:
    """The same batches, padded, and the loss in chunks of rows, with two whole forwards: what sharing is worth."""
    work = Work(below)

    @torch.no_grad()
    def losses(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(setting.device)
        stream = work.model.model(input_ids=ids, use_cache=False).last_hidden_state
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, document in enumerate(batch):
            real[row, 1 : len(document)] = True
        rows, target = stream[:, :-1][real[:, 1:]], ids[real]
        parts = zip(rows.split(1024), target.split(1024), strict=True)
        found = torch.cat(
            [nn.functional.cross_entropy(work.model.lm_head(x).float(), y, reduction="none") for x, y in parts]
        )
        return [one.double().mean() for one in found.split([len(document) - 1 for document in batch])]

    def run() -> Any:
        scores = torch.zeros(len(work.documents), dtype=torch.float64)
        for batch in by_length(list(enumerate(work.documents)), BUDGET, batch_cost(work.model)):
            base = losses([ids for _, ids in batch])
            with steer(work.model, Ablate(work.heads, mode="uniform")):
                masked = losses([ids for _, ids in batch])
            scores[[number for number, _ in batch]] = work.scores(base, masked)
        return scores

    return run


@contextmanager
def evened(model: Any, heads: list[str]) -> Iterator[None]:
    """By hand, without headwise: a masked head's part of what the output projection reads is the mean of the values."""
    hooks, config = [], model.config
    size = model.model.layers[0].self_attn.head_dim
    per_key = config.num_attention_heads // config.num_key_value_heads
    for layer, block in enumerate(model.model.layers):
        chosen = [int(name.split(".")[1]) for name in heads if name.split(".")[0] == str(layer)]
        if not chosen:
            continue
        kept: list[torch.Tensor] = []

        def keep(module: Any, given: Any, values: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            kept[:] = [values]

        def even(module: Any, given: Any, kept: list[torch.Tensor] = kept, chosen: list[int] = chosen) -> Any:
            z, v = given[0].clone(), kept.pop().float()
            count = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None]
            for head in chosen:
                key = head // per_key
                part = v[..., key * size : (key + 1) * size].cumsum(1) / count
                z[..., head * size : (head + 1) * size] = part.to(z.dtype)
            return (z,)

        hooks.append(block.self_attn.v_proj.register_forward_hook(keep))
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(even))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def one_by_one(below: int | None) -> Callable[[], Any]:
    """A document at a time, the model's own loss, two forwards, heads masked by two hooks: the script people write."""
    work = Work(below)

    @torch.no_grad()
    def loss(ids: torch.Tensor) -> torch.Tensor:
        given = ids[None].to(setting.device)
        return work.model(input_ids=given, labels=given, use_cache=False).loss

    def run() -> Any:
        base = [loss(ids) for ids in work.documents]
        with evened(work.model, work.heads):
            masked = [loss(ids) for ids in work.documents]
        return work.scores(base, masked)

    return run


def variants(below: int | None) -> list[Variant]:
    return [
        Variant("one document at a time", partial(one_by_one, below)),
        Variant("two forwards, same batches", partial(two_forwards, below)),
        Variant("headwise, shared prefix", partial(shared, below)),
    ]


def least(below: int | None) -> float:
    """Products of weights that scoring takes, as a share of those of two forwards."""
    model = Work(below).model
    layers = [sum(one.numel() for one in layer.parameters() if one.ndim == 2) for layer in model.model.layers]
    first = int(TEXT_HEADS[0].split(".")[0]) if below is None else below
    whole = sum(layers) + model.lm_head.weight.numel()
    return 1 - sum(layers[:first]) / (2 * whole)


# Written out, so that the benchmarks are listed without a model; `check` compares the shares.
NAMES: dict[int | None, str] = {
    None: "text specimen, 2 of 4 layers below, 0.802 of two forwards",
    4: "Llama, 4 of 12 layers below, 0.850 of two forwards",
    8: "Llama, 8 of 12 layers below, 0.699 of two forwards",
}


def check() -> None:
    """The three give the same scores, and the names say what is so."""
    bound = 1e-4 if setting.dtype == "float32" else 5e-2
    for below, name in NAMES.items():
        if f"{least(below):.3f} of" not in name:
            raise AssertionError(f"influence: {name}, but the share is {least(below):.3f}")
        reference = one_by_one(below)()
        for other in (two_forwards(below)(), shared(below)()):
            torch.testing.assert_close(other, reference, rtol=bound, atol=bound)


def benchmark() -> Benchmark:
    return Benchmark("influence", {name: partial(variants, below) for below, name in NAMES.items()}, check, rounds=5)
