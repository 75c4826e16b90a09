"""The `text` specimen: a four-layer grouped-query Llama that reads prose and code and copies from its context.

It is the model every command uses where none is named. Half of what it reads is text (Python's reference manual,
docstrings, source code, our own stories), the rest asks it to copy: repeated random tokens, passages that return, facts
hidden in a text and asked for at its end. So its heads include sinks, previous-token, induction and retrieval heads.
"""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from headwise.specimens._stories import story
from headwise.specimens._text_data import COPY, STORIES, TASKS, TEXT, Streams, batch, read_sources
from headwise.training import OptimiserSpec, fit, trapezoid

NAME = "text"
SUMMARY = "four layers of eight heads (four key heads) that read prose and code and copy from their context"

VOCABULARY = 2000
LEARNING_RATE = 3e-3
DECAY = 0.05
WARM_UP = 100
TOKENS = 3072  # of one step, about
# (steps, share of each task's sequences, lengths with their weights): short ones first
PHASES: list[tuple[int, dict[str, float], dict[int, int]]] = [
    (600, {"text": 0.20, "repeats": 0.45, "segments": 0.15, "needles": 0.20}, {64: 1, 96: 2}),
    (1040, {"text": 0.25, "repeats": 0.25, "segments": 0.15, "needles": 0.35}, {128: 1}),
    (510, {"text": 0.25, "repeats": 0.20, "segments": 0.15, "needles": 0.40}, {128: 2, 256: 1}),
    (410, {"text": 0.25, "repeats": 0.20, "segments": 0.15, "needles": 0.40}, {128: 2, 256: 2, 512: 1}),
]
WEIGHTS = {"text": 1.0, "repeats": 0.5, "segments": 0.5, "needles": 1.0}  # of the task means in the loss
EVALUATED_LENGTHS = (96, 128, 256, 512)


def build() -> nn.Module:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def build_tokenizer(sources: list[Any], seed: int = 0) -> Any:
    """Byte-level BPE with single digits, learned from equal parts of prose, stories and code."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = Random(seed)
    texts = {kind: [s.text for s in sources if s.kind == kind and not s.held_out] for kind in ("prose", "code")}
    texts["stories"] = [story(rng) for _ in range(STORIES // 5)]
    share = min(sum(map(len, group)) for group in texts.values())
    learned: list[str] = []
    for group in texts.values():
        room = 2 * share
        for text in sorted(group, key=lambda _: rng.random()):
            if room > 0:
                learned.append(text[:room])
                room -= len(text)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        learned,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def plan(step: int, phases: list[Any]) -> tuple[dict[str, float], dict[int, int]]:
    """Which tasks and lengths a step draws from."""
    for count, *rest in phases:
        if step < count:
            return rest[0], rest[1]
        step -= count
    return phases[-1][1:]


def batches(streams: Streams, phases: list[Any], tokens: int = TOKENS) -> Callable[[int, torch.Generator], Any]:
    """Batches of one length each, about `tokens` tokens."""

    def draw(step: int, generator: torch.Generator) -> Any:
        tasks, lengths = plan(step, phases)
        weights = torch.tensor(list(lengths.values()), dtype=torch.float)
        length = list(lengths)[int(torch.multinomial(weights, 1, generator=generator))]
        rows = tokens / length
        return batch(streams, {name: max(1, round(share * rows)) for name, share in tasks.items()}, length, generator)

    return draw


def loss(model: Any, drawn: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the tasks' mean losses over the tokens that count, by `WEIGHTS`."""
    ids, marks, task = drawn
    # on a CPU, backward through materialised weights is faster than through the fused operator up to 128 tokens
    model.set_attn_implementation("eager" if ids.shape[1] <= 128 else "sdpa")
    logits = model(input_ids=ids).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    each, marks = each.view_as(ids[:, 1:]), marks[:, 1:]
    parts = {"text": each[marks == TEXT].mean()}
    for index, name in enumerate(TASKS):
        chosen = (marks == COPY) & (task == index)[:, None]
        if bool(chosen.any()):
            parts[name] = each[chosen].mean()
    total = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
    return total, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def evaluate(model: Any, streams: Streams, *, seed: int = 10_000, sequences: int = 48) -> dict[str, Any]:
    """Losses on held-out text, and accuracies of copying by length: of tokens, and of whole answers for needles."""

    def run(task: str, length: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed + length)
        ids, marks, _ = batch(streams, {task: sequences}, length, generator, **options)
        counted = marks == (TEXT if task == "text" else COPY)
        logits = torch.cat([model(input_ids=rows).logits for rows in ids.split(8)])[:, :-1].float()
        right = (logits.argmax(-1) == ids[:, 1:]) & counted[:, 1:]
        losses = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        return right, counted[:, 1:], losses

    figures: dict[str, Any] = {"loss": {}, "repeats": {}, "needles": {}}
    for part in ("held-out prose", "held-out code", "stories"):
        figures["loss"][part] = {str(n): round(float(run("text", n, part=part)[2].mean()), 4) for n in (256, 512)}
    for length in EVALUATED_LENGTHS:
        right, counted, _ = run("repeats", length, segment=length // 4)
        figures["repeats"][str(length)] = round(float(right.sum() / counted.sum()), 4)
        for name, ending in (("question", 0), ("completion", 2)):
            right, counted, _ = run("needles", length, part="held-out prose", ending=ending)
            figures["needles"].setdefault(name, {})[str(length)] = {
                "tokens": round(float(right.sum() / counted.sum()), 4),
                "answers": round(float((right.sum(1) == counted.sum(1)).float().mean()), 4),
            }
    return figures


def train(
    out: str | Path,
    *,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    steps: int | None = None,
    stories: int = STORIES,
    tokens: int = TOKENS,
    sequences: int = 48,
) -> Path:
    """Train tokenizer and model from nothing; write the model, its tokenizer and its card to `out`.

    steps: another budget (the phases keep their shares). stories, tokens, sequences: smaller for a quick trial.
    """
    from headwise.specimens.registry import write_specimen

    start = time.perf_counter()
    notes: list[str] = []
    sources, changed = read_sources(notes.append)
    for line in notes:
        if log is not None:
            log({"note": line})
    tokenizer = build_tokenizer(sources)
    streams = Streams(tokenizer, sources, stories=stories)
    whole = sum(count for count, *_ in PHASES)
    phases = [(max(1, round(count * (steps or whole) / whole)), *rest) for count, *rest in PHASES]
    total = steps or whole
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build()
    history = fit(
        model,
        batches(streams, phases, tokens),
        loss,
        steps=total,
        seed=seed,
        optimiser=OptimiserSpec(lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=DECAY),
        schedule=trapezoid(warmup=WARM_UP, decay=0.3),
        log=log,
        log_every=25,
        autocast=torch.bfloat16,
    )
    model = model.to(torch.bfloat16).float()  # what ships is what was measured
    model.set_attn_implementation("sdpa")
    minutes = (time.perf_counter() - start) / 60
    card = {
        "summary": SUMMARY,
        "seed": seed,
        "steps": total,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "recipe": {
            "phases": [
                {"steps": count, "sequences": tasks, "lengths": {str(n): w for n, w in lengths.items()}}
                for count, tasks, lengths in phases
            ],
            "optimiser": f"AdamW {LEARNING_RATE}, betas 0.9 0.98, decay {DECAY}, warm-up {WARM_UP}, linear fall over "
            "the last 30 %, clip 1, bf16 autocast",
            "loss": "mean over all running text, and over the asked tokens of each task, summed with weights",
            "weights": WEIGHTS,
            "tokens_per_step": tokens,
        },
        "text": {
            "listed": "headwise/specimens/corpus/sources.json",
            "changed": changed,
            "stories": stories,
            "tokens": {name: len(ids) for name, ids in streams.parts.items()},
        },
        "losses": history.records[:: max(1, len(history.records) // 40)] + history.records[-1:],
        "accuracies": evaluate(model, streams, sequences=sequences),
    }
    return write_specimen(Path(out), model, tokenizer, card, NAME)
