"""The one small training loop that specimens and reproductions share: a budget in steps, so that a run repeats exactly.

`fit` trains one model; `fit_seeds` trains several seeds of a pure-torch module at once by vmap. What users train
themselves goes through transformers' Trainer. Losses that help any of these are here by name: `AttentionAT`, `WordAT`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.adversarial import AttentionAT, WordAT

__all__ = [
    "AttentionAT",
    "History",
    "OptimiserSpec",
    "WordAT",
    "constant",
    "fit",
    "fit_seeds",
    "trapezoid",
    "warmup_cosine",
]

Schedule = Callable[[int, int], float]  # (step, steps) -> factor on the learning rate
Batches = Callable[[int, torch.Generator], Any] | Iterable[Any]  # (step, generator) -> batch, or the batches themselves
Loss = Callable[[Any, Any], Tensor | tuple[Tensor, Mapping[str, Tensor | float]]]  # (model, batch) -> loss, figures


@dataclass(frozen=True)
class OptimiserSpec:
    """AdamW or SGD by name; `momentum` is SGD's, `betas` and `eps` are AdamW's. Weight decay is decoupled in AdamW."""

    name: str = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        if self.name == "adamw":
            return torch.optim.AdamW(
                parameters, self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
            )
        if self.name == "sgd":
            return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        raise ValueError(f"OptimiserSpec: name is {self.name!r}; expected 'adamw' or 'sgd'")


def constant(step: int, steps: int) -> float:
    """The learning rate as it is."""
    return 1.0


def warmup_cosine(warmup: int = 100, final: float = 0.0) -> Schedule:
    """Linear warm-up over `warmup` steps, then half a cosine down to `final` times the learning rate."""

    def factor(step: int, steps: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def trapezoid(warmup: int = 100, decay: float = 0.5, final: float = 0.0) -> Schedule:
    """Linear warm-up, constant, then a linear fall to `final` over the last share `decay` of the steps."""

    def factor(step: int, steps: int) -> float:
        fall = max(1, round(decay * steps))
        return min(1.0, (step + 1) / max(1, warmup), final + (1 - final) * (steps - step) / fall)

    return factor


@dataclass
class History:
    """What a run did: the loss of every step (fit_seeds: a list of them), logged figures, seconds of clock and CPU."""

    losses: list[Any] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    steps: int,
    seed: int = 0,
    optimiser: OptimiserSpec | Callable[[Iterable[Tensor]], torch.optim.Optimizer] = OptimiserSpec(),
    schedule: Schedule = constant,
    clip: float | None = 1.0,
    log: Callable[[dict[str, Any]], None] | None = None,
    log_every: int = 100,
    masks: Mapping[str, Tensor] | None = None,
    autocast: torch.dtype | None = None,
    checkpoints: Iterable[int] = (),
    on_checkpoint: Callable[[int, nn.Module], None] | None = None,
) -> History:
    """Train `model` in place for exactly `steps` steps.

    batches: `batches(step, generator)` with a generator seeded by `seed` on the CPU, or an iterable of batches.
    loss: `loss(model, batch)` gives a scalar, or a scalar and a dict of figures for the log.
    clip: largest gradient norm over all parameters; None does not clip.
    masks: parameter name -> tensor broadcastable to it, 1 = train, 0 = stay: those entries end bit-identical, whatever
    the optimiser's momentum and weight decay do. checkpoints: the steps (0 = before training, `steps` = after it) at
    which `on_checkpoint(step, model)` is called. Dropout draws from torch's global generator, seeded and restored here.
    Raises ValueError for a mask of an unknown parameter, batches that run out, and a loss that is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = _frozen(parameters, masks or {})
    step_rule = (optimiser.build if isinstance(optimiser, OptimiserSpec) else optimiser)(parameters.values())
    device = next(iter(parameters.values())).device
    history, start, due = History(cpu_seconds=-time.process_time()), time.perf_counter(), set(checkpoints)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        stream = _stream(batches, seed, steps)
        model.train()
        for step in range(steps):
            if step in due and on_checkpoint is not None:
                on_checkpoint(step, model)
            with torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext():
                value, figures = _pair(loss(model, next(stream)))
            step_rule.zero_grad(set_to_none=True)
            value.backward()
            for name, mask, _ in kept:
                if (grad := parameters[name].grad) is not None:
                    grad.mul_(mask)
            _step(step_rule, list(parameters.values()), schedule(step, steps), clip)
            with torch.no_grad():
                for name, mask, before in kept:
                    parameters[name].copy_(torch.where(mask.bool(), parameters[name], before))
            _note(history, step, steps, [value.detach()], figures, log, log_every, start)
        history.losses = [row[0] for row in history.losses]
        if steps in due and on_checkpoint is not None:
            on_checkpoint(steps, model)
    model.eval()
    history.seconds = time.perf_counter() - start
    history.cpu_seconds += time.process_time()
    return history


def fit_seeds(
    build: Callable[[], nn.Module],
    batches: Batches,
    loss: Loss,
    *,
    steps: int,
    seeds: Sequence[int],
    optimiser: OptimiserSpec = OptimiserSpec(),
    schedule: Schedule = constant,
    clip: float | None = 1.0,
    log: Callable[[dict[str, Any]], None] | None = None,
    log_every: int = 100,
) -> tuple[list[nn.Module], History]:
    """Train one model per seed in a single vmapped loop: same result per seed as `fit`, up to rounding.

    build: makes a fresh module; it is called once per seed with torch's generator at that seed.
    batches: `batches(step, generator)`, drawn for each seed on its own; all seeds must get tensors of one shape.
    loss: receives a callable in place of the module (no attributes). No dropout, no buffers that change.
    Returns the trained modules in the order of `seeds`.
    """
    from torch.func import functional_call, grad_and_value, stack_module_state, vmap
    from torch.utils._pytree import tree_map

    if not callable(batches):
        raise TypeError("fit_seeds: batches is an iterable; pass batches(step, generator): each seed has its own")
    models = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(build().train())
    parameters, buffers = stack_module_state(models)
    template = models[0]

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> tuple[Tensor, dict[str, Any]]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(template, (parameters, buffers), args, kwargs)

        return _pair(loss(call, batch))

    gradients = vmap(grad_and_value(one, has_aux=True), randomness="different")
    step_rule = optimiser.build(parameters.values())
    streams = [_stream(batches, seed, steps) for seed in seeds]
    history, start = History(cpu_seconds=-time.process_time()), time.perf_counter()
    for step in range(steps):
        batch = tree_map(lambda *leaves: torch.stack(leaves), *[next(stream) for stream in streams])
        grads, (values, figures) = gradients(parameters, buffers, batch)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]
        _step(step_rule, list(parameters.values()), schedule(step, steps), clip, stacked=True)
        _note(history, step, steps, list(values.detach()), figures, log, log_every, start)
    with torch.no_grad():
        for index, model in enumerate(models):
            for name, parameter in model.named_parameters():
                parameter.copy_(parameters[name][index])
            model.eval()
    history.seconds = time.perf_counter() - start
    history.cpu_seconds += time.process_time()
    return models, history


def _pair(result: Any) -> tuple[Tensor, dict[str, Any]]:
    return (result[0], dict(result[1])) if isinstance(result, tuple) else (result, {})


def _stream(batches: Batches, seed: int, steps: int) -> Iterator[Any]:
    if callable(batches):
        generator = torch.Generator().manual_seed(seed)
        yield from (batches(step, generator) for step in range(steps))
    else:
        yield from batches
    raise ValueError(f"fit: the batches ran out before step {steps}; give at least `steps` of them, or a function")


def _frozen(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    if unknown := sorted(set(masks) - set(parameters)):
        raise ValueError(f"fit: masks names {unknown[0]!r}, which is no trainable parameter of the model")
    return [(name, mask.to(parameters[name]), parameters[name].detach().clone()) for name, mask in masks.items()]


def _step(
    rule: torch.optim.Optimizer, parameters: list[Tensor], factor: float, clip: float | None, *, stacked: bool = False
) -> None:
    if clip is not None and stacked:  # one norm per seed, as each seed alone would have it
        square = torch.stack([p.grad.flatten(1).square().sum(1) for p in parameters if p.grad is not None]).sum(0)
        scale = (clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale.view(-1, *[1] * (p.ndim - 1)))
    elif clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    for group in rule.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
    rule.step()


def _note(
    history: History,
    step: int,
    steps: int,
    values: list[Tensor],
    figures: dict[str, Any],
    log: Any,
    every: int,
    start: float,
) -> None:
    row = [float(value) for value in values]
    if not all(math.isfinite(value) for value in row):
        raise ValueError(f"fit: the loss is {row} at step {step}; lower the learning rate or clip the gradient")
    history.losses.append(row)
    if step % every == 0 or step == steps - 1:
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in figures.items()}
        record = {
            "step": step,
            "loss": row if len(row) > 1 else row[0],
            "seconds": time.perf_counter() - start,
            **plain,
        }
        history.records.append(record)
        if log is not None:
            log(record)
