"""Prompts that the shipped models can answer, whole or in part, with their answers and what in them matters.

For experiments on answers: the losses, the accuracy, and which part of a prompt they come from.
"""

from random import Random
from typing import Any

import torch

from headwise.hf.spans import find_spans
from headwise.specimens import backcopy
from headwise.specimens._stories import fact
from headwise.specimens._text_data import read_sources
from headwise.tasks.mixture import Mixture
from headwise.tasks.needles import needle
from headwise.tasks.prompted import PromptBatch
from headwise.tasks.symbol_needles import needle_episodes

__all__ = ["backcopy_prompts", "prose_prompts", "symbol_prompts"]

TASKS = ("needles", "coloured_objects", "indirect_objects", "addition", "multiple_choice")
# Where the question of a task is, in tokens before its answer; and the options of multiple choice.
QUESTIONS = {"needles": (3, 0), "coloured_objects": (3, 0), "indirect_objects": (4, 0)}
OPTIONS = (9, 1)


def symbol_prompts(
    count: int, seed: int = 0, *, length: int = 64, needle_size: int = 6, tasks: tuple[str, ...] = TASKS
) -> dict[str, PromptBatch]:
    """Tasks of the `tasks` model, `count` prompts each; parts are the spans of the task, its question, its options.

    needle_size: words of a needle; the model learned six and tells eight in part.
    """
    mixture, generator = Mixture(), torch.Generator().manual_seed(seed)
    symbols = mixture.symbols
    labels = {"multiple_choice": symbols.labels, "addition": symbols.digits, "coloured_objects": symbols.colours}
    found = {}
    for name in tasks:
        if name == "needles":
            ask, answer = symbols.ids("Q ANS").tolist()
            episodes = needle_episodes(
                count,
                symbols.plain_words,
                mixture.text,
                ask=ask,
                answer=answer,
                length=length,
                size=needle_size,
                generator=generator,
            )
        else:
            episodes = mixture.episodes(name, count, length, generator)
        batch = PromptBatch.of_episodes(episodes, labels.get(name, symbols.words))
        before = batch.asked.int().argmax(1, keepdim=True) - torch.arange(length)  # 1 is the token before the answer
        groups = {part: mask for part, mask in batch.groups.items() if not part.startswith("twin")}
        for part, place in (("question", QUESTIONS.get(name)), ("options", OPTIONS)):
            if place is not None and (part == "question" or name == "multiple_choice"):
                groups[part] = (before <= place[0]) & (before > place[1])
        found[name] = PromptBatch(name, batch.input_ids, batch.real, batch.asked, groups, batch.labels)
    return found


def prose_prompts(tokenizer: Any, count: int, seed: int = 0, *, length: int = 128, rival: bool = True) -> PromptBatch:
    """A fact in prose that the `text` model was not trained on, and a question for it; parts are source and question.

    length: most tokens of a prompt, its answer not counted. rival: a second fact of the same kind stands in the prose,
    the answer to another question; its answer is the part `rival`.
    """
    rng = Random(seed)
    prose = "\n\n".join(source.text for source in read_sources()[0] if source.kind == "prose" and source.held_out)
    prompts, answers, sources, questions, rivals = [], [], [], [], []
    while len(prompts) < count:
        start = prose.index(" ", rng.randrange(len(prose) - 10 * length)) + 1
        told = fact(rng)
        other = fact(rng, told.kind)
        (made,) = needle(
            tokenizer=tokenizer,
            haystack=(f"{other.sentence} " if rival else "") + prose[start:],
            facts=[(told.sentence, told.question, told.answer)],
            lengths=(length,),
            depths=(rng.randrange(5) / 4,),
        )
        if rival and (other.question == told.question or made.text.count(other.answer) != 1):
            continue  # no other fact, or one that the length left no room for
        ids, ending = tokenizer(made.text)["input_ids"], made.text[made.text.rindex("\nBased on the content") :]
        prompts.append(torch.tensor(ids))
        answers.append(torch.tensor(tokenizer(f" {told.answer}", add_special_tokens=False)["input_ids"]))
        sources.append(made.span)
        questions.append((len(ids) - len(tokenizer(ending, add_special_tokens=False)["input_ids"]), len(ids)))
        if rival:
            spot = find_spans(tokenizer, made.text, other.answer)[0]
            rivals.append((spot.start, spot.end))
    groups = {"source": sources, "question": questions, **({"rival": rivals} if rival else {})}
    return PromptBatch.of_texts("needles in prose", prompts, answers, groups, pad=tokenizer.pad_token_id)


def backcopy_prompts(count: int, seed: int = 0) -> PromptBatch:
    """Text of the `backcopy` models, in which every token from the third on is asked."""
    ids = backcopy.task().sample(count, torch.Generator().manual_seed(seed))
    asked = (torch.arange(ids.shape[1]) > 1).expand_as(ids)
    return PromptBatch("backcopy", ids, torch.ones_like(asked), asked)
