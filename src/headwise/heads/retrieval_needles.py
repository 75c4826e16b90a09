"""The probe "retrieval" of a scan: retrieval heads on needles in the model's own vocabulary, teacher-forced.

Paper: headwise/papers/retrieval_heads.py (Wu et al., ICLR 2025).
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from headwise.attend.head_map import HeadMap
from headwise.errors import UnsupportedModel
from headwise.heads.induction_repeat import frequent_tokens
from headwise.heads.prompt_probe import PromptProbe
from headwise.heads.retrieval import NothingAnswered, copy_scores
from headwise.hf.inputs import context_length, vocabulary_size
from headwise.tasks.needles import Needle, needle
from headwise.tasks.symbols import Symbols

__all__ = ["RetrievalNeedles"]

LENGTHS = {"sentence": (256, 512), "symbols": (64, 128, 256)}
DEPTHS, REPEATS = (0.0, 0.25, 0.5, 0.75, 1.0), 2
ANSWERED = 0.25  # share of the prompts that must be answered before simpler ones are tried


class RetrievalNeedles(PromptProbe):
    """Retrieval score on facts hidden in generated prose, or in random tokens where the model does not answer those.

    The second kind ends with two tokens that stand before the answer, so that any model that copies can answer it.
    """

    name = "retrieval"
    sentence = (
        "How often the head looks at exactly the token that the model is about to copy from its context: "
        "from 0.1 on a retrieval head."
    )
    unit = "share of copied tokens"

    def measure(self, model: nn.Module, tokenizer: Any = None, *, seed: int = 0) -> HeadMap:
        """Raises UnsupportedModel for a model that answers none of the needles."""
        best: HeadMap | None = None
        tried = 0
        for kind, make in _kinds(model, tokenizer, seed):
            prompts = make()
            tried += len(prompts)
            try:
                found = copy_scores(model, prompts, tokenizer=tokenizer if kind == "sentence" else None)
            except NothingAnswered:
                continue
            found.source = f"{found.source}, needles in {'prose' if kind == 'sentence' else 'tokens'}, seed {seed}"
            if len(found.runs[self.name]) >= ANSWERED * len(prompts):
                return found
            best = best or found
        if best is None:
            raise UnsupportedModel(
                f"{self.name}: {type(model).__name__} answered none of {tried} needles, so no head retrieves; give "
                "prompts that it can answer to headwise.heads.retrieval_scores"
            )
        return best


def _kinds(model: nn.Module, tokenizer: Any, seed: int) -> list[tuple[str, Callable[[], list[Needle]]]]:
    """The kinds of needles to try, the more natural one first; those that do not fit the context are left out."""
    room = context_length(model, tokenizer)
    options: dict[str, Any] = {"depths": DEPTHS, "repeats": REPEATS, "seed": seed}

    def lengths(kind: str, least: int, spare: int) -> list[int]:
        fits = [length for length in LENGTHS[kind] if room is None or length + spare <= room]
        return fits or ([room - spare] if room is not None and room - spare >= least else [])

    kinds: list[tuple[str, Callable[[], list[Needle]]]] = []
    tokens = lengths("symbols", 24, 6)
    if tokenizer is not None and _speaks_symbols(tokenizer):
        return [("symbols", lambda: needle("symbols", lengths=tokens, **options))]
    prose = lengths("sentence", 200, 48)
    if prose and getattr(tokenizer, "is_fast", False) and _spells(tokenizer):
        kinds.append(("sentence", lambda: needle("sentence", tokenizer=tokenizer, lengths=prose, **options)))
    pool = frequent_tokens(tokenizer, vocabulary_size(model))
    if tokens and len(pool) >= 24:
        config = getattr(model, "config", None)
        owner = config if tokenizer is None else tokenizer
        bos = getattr(owner, "bos_token_id", None)
        first, ask, answer, *words = [*([] if bos is None else [bos]), *(i for i in pool if i != bos)]
        made = {"words": words, "marks": (ask, answer), "bos": first}
        kinds.append(("symbols", lambda: needle("symbols", lengths=tokens, **made, **options)))
    return kinds


def _spells(tokenizer: Any) -> bool:
    """Whether the tokenizer has pieces for any English text: not one of whole words."""
    return tokenizer.unk_token_id not in tokenizer("The silver lantern is kept behind the stove.")["input_ids"]


def _speaks_symbols(tokenizer: Any) -> bool:
    """Whether this is the vocabulary of the synthetic tasks, in which Q and ANS mean something."""
    names = Symbols.names
    return len(tokenizer) == len(names) and tokenizer.convert_tokens_to_ids(list(names)) == list(range(len(names)))
