"""What active_dormant_heads.py measures on: small decoders trained on Bigram-Backcopy, and texts for our text model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.backcopy_decoder import BackcopyDecoder, Trace
from headwise.papers.running import Run
from headwise.specimens._text_data import read_sources
from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.training import OptimiserSpec, fit

STEPS, DEEP_STEPS, CHECKPOINTS = 1600, 1200, tuple(range(0, 1601, 100))
TEXTS, LENGTH = 48, 256


@dataclass
class State:
    """What the paper plots for a model: mean weights, value and residual ratios for each layer, and losses."""

    sink_other: list[float]
    sink_trigger: list[float]
    before_trigger: list[float]
    drain: list[float]
    peak: list[float]
    losses: dict[str, float]


class Toy:
    """The task, and models trained on it."""

    def __init__(self, run: Run):
        self.run, self.text = run, BigramBackcopy(32, 3, 48, seed=run.seed)
        self.seen = self.text.sample(256, torch.Generator().manual_seed(10_000 + run.seed))
        self.along: dict[int, State] = {}
        self.found: dict[str, State] = {}

    def train(self, name: str, *, steps: int = STEPS, sgd: bool = False, **options: Any) -> nn.Module:
        self.run.log(f"training {name}")
        adamw = OptimiserSpec(lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
        torch.manual_seed(self.run.seed)
        model = BackcopyDecoder(self.text.num_tokens, self.text.length, **options)
        fit(
            model,
            lambda step, generator: self.text.sample(32, generator),
            lambda model, ids: torch.nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:]),
            steps=steps,
            seed=self.run.seed,
            optimiser=OptimiserSpec("sgd", lr=0.3, momentum=0.9) if sgd else adamw,
            clip=1.0 if sgd else None,  # at this rate SGD diverges without
            checkpoints=() if options else CHECKPOINTS,
            on_checkpoint=lambda step, model: self.along.update({step: self.measure(model)}),
        )
        return model

    def measure(self, model: nn.Module, *, rows: Tensor | None = None, instead: str | None = None) -> State:
        """rows: which rows count as triggers, those of the task when None."""
        trace = Trace()
        with torch.no_grad():
            logits = model(self.seen, trace=trace, instead=instead)
        # Row 0 sees only itself, and the token before row 1 is BOS.
        trigger = (self.text.trigger_mask(self.seen) if rows is None else rows)[:, 2:]
        state = State([], [], [], [], [], self.text.losses(logits, self.seen))
        for weights, values, residual in zip(trace.weights, trace.values, trace.residuals[1:], strict=True):
            kept = weights[:, 0, 2:]
            share = kept[..., 0] / kept.sum(-1).clamp_min(1e-9)  # ReLU rows do not sum to 1
            state.sink_other.append(float(share[~trigger].mean()))
            state.sink_trigger.append(float(share[trigger].mean()))
            state.before_trigger.append(float(kept.diagonal(1, 1, 2)[trigger].mean()))
            state.drain.append(first_to_others(values[:, 0]))
            state.peak.append(first_to_others(residual))
        return state


def first_to_others(states: Tensor) -> float:
    norms = states.norm(dim=-1)
    return float(norms[:, 0].mean() / norms[:, 1:].mean())


def held_out(tokenizer: Any, kind: str, seed: int) -> Tensor:
    """Windows of text that the model was not trained on: prose, code, or random tokens repeated."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "repeats":
        part = torch.randint(3, len(tokenizer), (TEXTS, LENGTH // 4), generator=generator)
        ids = part.repeat(1, 4)[:, : LENGTH - 1]
    else:
        sources = [source for source in read_sources()[0] if source.kind == kind and source.held_out]
        stream = tokenizer("\n\n".join(s.text for s in sources), add_special_tokens=False, verbose=False).input_ids
        starts = torch.randint(0, len(stream) - LENGTH, (TEXTS,), generator=generator).tolist()
        ids = torch.tensor([stream[start : start + LENGTH - 1] for start in starts])
    return torch.cat([torch.full((TEXTS, 1), tokenizer.bos_token_id), ids], 1)
