"""Induction on random tokens said twice, where nothing but repetition helps to predict the next one."""

from typing import Any

import torch
from torch import nn

from headwise.attend.head_map import HeadMap
from headwise.attend.probes import Induction
from headwise.errors import UnsupportedModel
from headwise.heads.prompt_probe import PromptProbe
from headwise.hf.addresses import layout, tower_kinds
from headwise.hf.inputs import context_length, frugal, input_device, vocabulary_size
from headwise.hf.session import probe
from headwise.tasks.repeats import repeated_segments

__all__ = ["InductionRepeat", "frequent_tokens"]

BATCH, SEGMENT, POOL = 8, 64, 256
COMMON = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said what up its about
into than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each just
those people how too little good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off come since against go came right used take three"""


class InductionRepeat(PromptProbe):
    """Mean weight on what followed the first copy of a token: BOS and 64 random frequent tokens, twice, 8 sequences."""

    name = "induction-repeat"
    sentence = (
        "How much the head attends to what followed the token's first copy, on random words said twice: "
        "induction with nothing else to go by."
    )
    unit = "share of attention"
    by_default = True

    def measure(self, model: nn.Module, tokenizer: Any = None, *, seed: int = 0) -> HeadMap:
        if tower_kinds(model).get("") != "causal":
            raise UnsupportedModel(f"{self.name}: {type(model).__name__} is no decoder; only decoders repeat a text")
        pool = frequent_tokens(tokenizer, vocabulary_size(model))
        config: Any = model.config
        bos = getattr(config.get_text_config() if tokenizer is None else tokenizer, "bos_token_id", None)
        first, words = (pool[0], pool[1:]) if bos is None else (bos, [i for i in pool if i != bos])
        room = (context_length(model, tokenizer) or 2 * SEGMENT + 1) - 1
        segment = min(SEGMENT, len(words), room // 2)
        if segment < 2:
            raise UnsupportedModel(f"{self.name}: {len(pool)} tokens and a context of {room + 1} hold no repeated text")
        repeats = repeated_segments(
            BATCH,
            words,
            length=2 * segment + 1,
            segment=(segment, segment),
            bos=first,
            generator=torch.Generator().manual_seed(seed),
        )
        reading = Induction()
        with torch.no_grad(), probe(model, reading):
            model(input_ids=repeats.input_ids.to(input_device(model)), **frugal(model))
        table = layout(model)
        scores = reading.scores()
        return HeadMap(
            {self.name: {h: float(scores["", h.layer][h.head]) for h in table.heads() if ("", h.layer) in scores}},
            table,
            source=f"{BATCH} sequences of {segment} random tokens, twice, seed {seed}",
        )


def frequent_tokens(tokenizer: Any, size: int, count: int = POOL) -> list[int]:
    """Ids of frequent ordinary tokens below `size`: common English words that are one token, then low ids.

    Vocabularies are built from the most frequent pieces on, so low ids stand for frequent tokens in any language.
    Without a tokenizer all ids count as ordinary.
    """
    if tokenizer is None:
        return list(range(min(size, count)))
    special = set(tokenizer.all_special_ids)
    found: dict[int, None] = {}
    for word in COMMON.split():
        for form in (f" {word}", word):
            ids = [i for i in tokenizer(form, add_special_tokens=False)["input_ids"] if i not in special]
            if len(ids) == 1:
                found[ids[0]] = None
                break
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
        if len(found) >= count:
            break
        letters = (token or "").strip("▁Ġ ")
        ordinary = i not in special and len(letters) > 1 and not letters.startswith("<")
        if ordinary:
            found[i] = None
    if len(found) < SEGMENT:  # a vocabulary of single letters or numbers
        found |= dict.fromkeys(i for i in range(min(size, len(tokenizer))) if i not in special)
    return [i for i in list(found)[:count] if i < size]
