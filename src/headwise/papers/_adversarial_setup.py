"""What attention_adversarial_training.py trains and measures: four generated tasks, one small BiLSTM, seven ways."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.heads.gradient_correlation import attention_gradient_correlation, gradient_importance
from headwise.models.attention_classifier import AttentionClassifier, AttentionClassifierConfig
from headwise.papers.running import Run
from headwise.tasks.cue_words import SentenceBatch, cue_inference, cue_questions, cue_sentences
from headwise.training import AttentionAT, WordAT, fit

EPSILONS = (0.5, 1.0, 2.0, 5.0, 10.0)
ATTACK = 5.0  # length of the attack on scores at test time, and of the perturbation of the robustness row
SIZE = 64  # sentences of a batch

SENTIMENT = "sentiment"
VANILLA, UNIFORM, RANDOM, MINUS = "vanilla", "uniform weights", "random", "minus AT"
AT, IAT, WORD_AT, WORD_IAT = "attention AT", "attention iAT", "word AT", "word iAT"
SWEPT = (AT, IAT, WORD_AT, WORD_IAT)
METHODS = (VANILLA, RANDOM, WORD_AT, WORD_IAT, AT, IAT)


class MinusAT(AttentionAT):
    """Down the gradient instead of up: what the released code of iAT does."""

    def direction(self, gradients: dict[Any, Tensor], places: Any) -> dict[Any, Tensor]:
        return {key: -gradient for key, gradient in gradients.items()}


MAKERS: dict[str, Callable[..., Any]] = {
    RANDOM: partial(AttentionAT, mode="random"),
    AT: partial(AttentionAT, mode="at"),
    IAT: partial(AttentionAT, mode="iat"),
    WORD_AT: partial(WordAT, mode="at"),
    WORD_IAT: partial(WordAT, mode="iat"),
    MINUS: MinusAT,
}


@dataclass(frozen=True)
class Task:
    """Generated data: train, validation (to choose eps) and test, whose labels are the clean ones. labels: logits."""

    name: str
    labels: int
    vocabulary: int
    train: SentenceBatch
    validation: SentenceBatch
    test: SentenceBatch
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * (len(self.train) // SIZE)


def make_tasks(seed: int, *, train: int = 1024, test: int = 400, epochs: int = 6) -> dict[str, Task]:
    """The tasks of a seed: two of classes, one of questions, one of inference, which gets three times the data."""

    def made(name: str, labels: int, vocabulary: int, times: int, draw: Callable[..., SentenceBatch], number: int):
        parts = [
            draw(size, torch.Generator().manual_seed(1000 * seed + 10 * number + part))
            for part, size in enumerate((times * train, test, test))
        ]
        return Task(name, labels, vocabulary, parts[0], parts[1], parts[2], epochs)

    classes = partial(cue_sentences, lengths=(5, 8))
    many: dict[str, int] = {"names": 6, "values": 4, "facts": 3, "length": 7, "vocab_size": 30}
    few: dict[str, int] = {"names": 3, "values": 2, "facts": 2, "length": 5, "vocab_size": 30}
    tasks = (
        made(SENTIMENT, 1, 300, 1, classes, 0),
        made("topics", 4, 300, 1, partial(classes, num_classes=4), 1),
        made("questions", 4, 30, 1, partial(cue_questions, **many), 2),
        made("inference", 3, 30, 3, partial(cue_inference, **few), 3),
    )
    return {task.name: task for task in tasks}


def build(task: Task, seed: int) -> AttentionClassifier:
    """The paper's model in small: embedding 32, 24 units per direction."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttentionClassifier(
            AttentionClassifierConfig(
                vocab_size=task.vocabulary,
                embedding_size=32,
                hidden_size=24,
                attention_size=24,
                num_labels=task.labels,
                pair=task.train.query_ids is not None,
            )
        )


def train(task: Task, method: str, eps: float, run: Run) -> AttentionClassifier:
    """Train one model. All methods start from the same weights and see the same batches."""
    model: Any = build(task, run.seed)
    model.to(run.device)
    make = MAKERS.get(method)
    adversarial = None if make is None else make(model, eps=eps)

    def batches(step: int, generator: torch.Generator) -> SentenceBatch:
        at = step % (len(task.train) // SIZE)
        if at == 0:
            batches.order = torch.randperm(len(task.train), generator=generator)
        return task.train.part(batches.order[at * SIZE : (at + 1) * SIZE])

    def loss(model: AttentionClassifier, batch: SentenceBatch) -> Tensor:
        device = run.device
        labels = batch.labels.to(device)
        if adversarial is None or isinstance(adversarial, WordAT):

            def whole() -> Tensor:
                return model(**inputs_of(batch, device), labels=labels).loss

            return whole() if adversarial is None else adversarial(whole)
        encoded = model.encode(**inputs_of(batch, device))  # the LSTMs run once for both passes
        return adversarial(lambda: model(encoded=encoded, labels=labels).loss)

    with uniform(model) if method == UNIFORM else contextlib.nullcontext():
        fit(
            model,
            batches,
            loss,
            steps=task.steps,
            seed=run.seed,
            optimiser=lambda parameters: torch.optim.Adam(parameters, 5e-3, amsgrad=True),
            clip=None,
        )
    return model


def inputs_of(batch: SentenceBatch, device: str) -> dict[str, Tensor]:
    """What the model's forward takes, without labels."""
    inputs = {"input_ids": batch.input_ids, "query_ids": batch.query_ids}
    return {name: value.to(device) for name, value in inputs.items() if value is not None}


@contextlib.contextmanager
def uniform(model: AttentionClassifier) -> Iterator[None]:
    """All real positions have the same score: mean pooling."""
    handle = model.attention.score_point.register_forward_hook(
        lambda module, args, scores: scores.masked_fill(~torch.isneginf(scores), 0)
    )
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Outcome:
    """One trained model on a test set; lists are over its sentences.

    right, attacked, shaken: 1 where the answer is right, as it is, under an attack on the scores, under noise of the
    same length. correlation: Pearson's r of attention and gradient importance. kendall: its mean tau. mass: mean weight
    on the words that decide. spread: largest minus smallest weight of each sentence.
    """

    right: list[float]
    correlation: list[float] = field(default_factory=list)
    kendall: float = 0.0
    mass: float = 0.0
    spread: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    shaken: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def answers(logits: Tensor) -> Tensor:
    """The class that is said."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def right(model: AttentionClassifier, batch: SentenceBatch, device: str) -> list[float]:
    with torch.no_grad():
        said = answers(model(**inputs_of(batch, device)).logits)
    return (said.cpu() == batch.clean).double().tolist()


def measure(model: AttentionClassifier, batch: SentenceBatch, run: Run) -> Outcome:
    """Everything that is measured of a model on a test set."""
    inputs, device = inputs_of(batch, run.device), run.device
    labels, mask = batch.clean.to(device), batch.mask
    with torch.no_grad():
        weights = model(**inputs).attentions[0][:, 0, 0].cpu()
    importance = gradient_importance(model, inputs).cpu()
    found = attention_gradient_correlation(weights, importance, mask)
    has_cues = batch.cues.any(1)
    shown = weights.masked_fill(~mask, torch.inf).amin(1)

    def under(mode: str) -> list[float]:
        attack = AttentionAT(model, eps=ATTACK, mode=mode)
        _, r = attack.perturbation(lambda: model(**inputs, labels=labels).loss)
        with attack.perturbed(r):
            return right(model, batch, device)

    return Outcome(
        right=right(model, batch, device),
        correlation=found.pearson.nan_to_num(0).tolist(),  # constant attention tells nothing
        kendall=found.mean_kendall,
        mass=float((weights * batch.cues).sum(1)[has_cues].mean()),
        spread=(weights.amax(1) - shown).tolist(),
        attacked=under("at"),
        shaken=under("random"),
    )


@dataclass
class Trained:
    """Every model of a run and what it does. sweep: method -> accuracy of each eps on the sentiment test."""

    tasks: dict[str, Task]
    outcomes: dict[tuple[str, str], Outcome]
    models: dict[tuple[str, str], AttentionClassifier]
    sweep: dict[str, list[float]]
    chosen: dict[str, float]

    def of(self, method: str, what: str) -> list[float]:
        """One list over the test sentences of all tasks."""
        return [value for task in self.tasks for value in getattr(self.outcomes[task, method], what)]


def train_all(run: Run, tasks: dict[str, Task]) -> Trained:
    """Sweep eps on the sentiment task, choose each method's by its validation accuracy there, then train every task.

    Random perturbations, whose eps nobody sweeps, have the eps that was chosen for Attention AT.
    """
    sentiment = tasks[SENTIMENT]
    swept = {}
    for method in SWEPT:
        for eps in run.progress(EPSILONS, f"eps of {method}"):
            swept[method, eps] = train(sentiment, method, eps, run)
    chosen = {
        method: max(EPSILONS, key=lambda e, m=method: sum(right(swept[m, e], sentiment.validation, run.device)))
        for method in SWEPT
    }
    chosen[RANDOM] = chosen[AT]
    run.log("chosen eps: " + ", ".join(f"{method} {eps:g}" for method, eps in chosen.items()))
    found = Trained(tasks, {}, {}, {}, chosen)
    for method in SWEPT:
        found.sweep[method] = [
            sum(hits) / len(hits)
            for hits in (right(swept[method, eps], sentiment.test, run.device) for eps in EPSILONS)
        ]
    for task in tasks.values():
        for method in run.progress((*METHODS, UNIFORM), f"training on {task.name}"):
            eps = chosen.get(method, 0.0)
            known = swept.get((method, eps)) if task is sentiment else None
            found.models[task.name, method] = model = known or train(task, method, eps, run)
            with uniform(model) if method == UNIFORM else contextlib.nullcontext():
                found.outcomes[task.name, method] = measure(model, task.test, run)
    # The robustness row compares at the length of the attack, whatever eps was chosen.
    for method, name in ((AT, f"{AT}, eps {ATTACK:g}"), (RANDOM, f"{RANDOM}, eps {ATTACK:g}"), (MINUS, MINUS)):
        model = swept.get((method, ATTACK)) or train(sentiment, method, ATTACK, run)
        found.outcomes[SENTIMENT, name] = measure(model, sentiment.test, run)
    return found
