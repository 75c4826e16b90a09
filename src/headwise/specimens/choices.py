"""The `choices` specimen: a four-layer Llama that answers multiple choice, its labels drawn at random."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.tasks.choice_mixture import ChoiceMixture
from headwise.tasks.episodes import answer_accuracy
from headwise.tasks.mixture import MixedBatch

LAYERS, HEADS, HEAD_DIM, HIDDEN, INNER = 4, 8, 16, 96, 192
WEIGHTS = {"text": 0.25}
@dataclass(frozen=True)
class Phase:
    steps: int
    tokens: int
    tasks: dict
    lengths: dict
    options: tuple = (4,)
    several: bool = False
PHASES = [
    Phase(500, 1536, {"repeats": 1}, {32: 1}),
    Phase(500, 1536, {"repeats": 1, "needles": 1, "random": 4}, {20: 1, 24: 1, 32:1}, (2, 3)),
    Phase(1000, 1792, {"bigrams": 1, "repeats": 1, "needles": 1, "random": 4, "standard":2, "label_first": 2}, {24: 1, 32: 1, 48: 1}, (2, 3, 4, 4)),
]
LEARNING_RATE = 3e-3
EVALUATED_LENGTHS = (24, 32, 64)
def build():
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
      num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_DIM, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=127))
def phase_of(step, phases):
    for p in phases:
        if step < p.steps: return p
        step -= p.steps
    return phases[-1]
def batches(mixture, phases):
    def draw(step, generator):
        p = phase_of(step, phases)
        w = torch.tensor(list(p.lengths.values()), dtype=torch.float)
        length = int(list(p.lengths)[int(torch.multinomial(w, 1, generator=generator))])
        share = p.tokens / length / sum(p.tasks.values())
        counts = {n: max(1, round(x * share)) for n, x in p.tasks.items()}
        return mixture.batch(counts, length, generator, options=tuple(p.options), several=p.several)
    return draw
def loss(model, batch):
    parts = batch.losses(model(input_ids=batch.input_ids).logits)
    total = torch.stack([WEIGHTS.get(n, 1.0) * v for n, v in parts.items()]).sum()
    return total, {n: v.detach() for n, v in parts.items()}
@torch.no_grad()
def evaluate(model, mixture, *, seed=10_000, sequences=256):
    table = {}
    for name in mixture.names:
        for length in EVALUATED_LENGTHS:
            g = torch.Generator().manual_seed(seed + length)
            e = mixture.episodes(name, sequences, length, g)
            logits = torch.cat([model(input_ids=i).logits for i in e.input_ids.split(64)])
            table.setdefault(name, {})[str(length)] = round(answer_accuracy(logits, e)["tokens"], 3)
    return table
