"""Arithmetic in text: prompts whose next word is a result, each with a counterfactual of equal length.

    symbols   7 + 2 =                      words      7 plus 2 equals
    noun      The sum of 7 and 2 is        question   Q: What is 7 plus 2? A:

Counterfactuals differ in what they measure: another operand tells which heads carry that number, another operator tells
which heads carry the operation, and the neutral one (`7 , 2 =`) which heads matter for calculating at all. The letters
control keeps the templates' roles and calculates nothing: `The first of K and M is`.

For vocabularies of a few symbols: `headwise.tasks.symbol_arithmetic`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.tasks.prompted import PromptBatch

__all__ = ["ArithmeticPrompt", "arithmetic", "arithmetic_batch", "arithmetic_metrics"]

TEMPLATES = ("symbols", "words", "noun", "question")
OPERATORS = {  # how each template writes an operator
    "symbols": {"+": "+", "-": "-", "*": "*", "/": "/", ",": ","},
    "words": {"+": "plus", "-": "minus", "*": "times", "/": "over", ",": "and"},
    "noun": {"+": "sum", "-": "difference", "*": "product", "/": "quotient", ",": "pair"},
    "letters": {"<": "first", ">": "last", ",": "pair"},
}
NEUTRAL = ","
CLASSES = ("+-", "*/")  # operators that may stand together in a row: evaluated from left to right
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TRIES = 2000

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ArithmeticPrompt:
    """One prompt and its counterfactual, of as many tokens (of as many roles where there is no tokenizer).

    answer, twin_answer: with the space before them; twin_answer is empty where the counterfactual asks for nothing.
    spans: `operand`, `operator`, `equals` -> where each stands in `text`, in tokens, or in characters without a
    tokenizer; `equals` are the last tokens, of which the last one answers. Those of the twin are the same in tokens.
    input_ids: they end with the space before the answer where a tokenizer makes that a token of its own.
    answer_ids: all tokens of the answer; with tokenizers that split numbers only the first of them is predicted by the
    prompt (`single` says whether it is the whole answer).
    """

    template: str
    text: str
    answer: str
    twin: str
    twin_answer: str
    operands: tuple[str, ...]
    operators: tuple[str, ...]
    spans: Mapping[str, Spans] = field(default_factory=dict)
    input_ids: Int[Tensor, " t"] | None = None
    twin_ids: Int[Tensor, " t"] | None = None
    answer_ids: Int[Tensor, " n"] | None = None
    twin_answer_ids: Int[Tensor, " m"] | None = None

    @property
    def single(self) -> bool:
        """Whether one token is the whole answer."""
        return self.answer_ids is not None and len(self.answer_ids) == 1


def arithmetic(
    n: int,
    ops: str = "+-*/",
    *,
    digits: int = 1,
    operands: int = 2,
    templates: str | Sequence[str] = TEMPLATES,
    counterfactual: str = "operator",
    letters: bool = False,
    before: str = "",
    tokenizer: Callable[..., Any] | None = None,
    seed: int = 0,
) -> list[ArithmeticPrompt]:
    """`n` prompts with their counterfactuals; templates take turns.

    ops: operators to draw from. Divisions are exact, differences not negative, nothing is divided by 0. With three
    operands both operators are of one kind (`+-` or `*/`), so that reading from the left is right.
    digits: of every operand: 0 to 9 or 10 to 99.
    counterfactual: `operator` changes an operator, `operands` one operand, `neutral` writes something in place of the
    operators that asks for nothing. The two answers differ, in their first tokens too.
    letters: the control without calculation. ops are then `<` (first) and `>` (last), both by default.
    before: text in front of every prompt, which shifts all positions.
    tokenizer: any fast tokenizer of transformers; prompts whose counterfactual is longer or shorter are not drawn, and
    `spans` count its tokens.
    Raises ValueError for arguments outside what is said here, and where no pair of equal length can be found.
    """
    if letters and ops == "+-*/":
        ops = "<>"
    chosen = [templates] if isinstance(templates, str) else list(templates)
    _check(n, ops, digits, operands, chosen, counterfactual, letters)
    rng = random.Random(seed)
    found: list[ArithmeticPrompt] = []
    first = ops[0]
    for index in range(n):
        template = chosen[index % len(chosen)]
        for attempt in range(TRIES):
            if attempt % 50 == 0:  # kept while operands are drawn: exact divisions are rare
                first = rng.choice(ops)
            drawn = _draw(rng, template, ops, first, digits, operands, counterfactual, letters)
            prompt = None if drawn is None else _written(template, *drawn, letters, before, tokenizer)
            if prompt is not None:
                found.append(prompt)
                break
        else:
            raise ValueError(
                f"arithmetic: no pair of equal length and different answers in {TRIES} draws of template {template!r} "
                f"with ops {ops!r}, {digits} digits and counterfactual {counterfactual!r}; choose others"
            )
    return found


def arithmetic_batch(prompts: Sequence[ArithmeticPrompt], *, pad: int = 0, twin: bool = False) -> PromptBatch:
    """Prompts with their answers as one batch; groups `operand-1`, `operand-2`, ..., `operator-1`, ..., `equals`.

    twin: the counterfactuals instead. Raises ValueError for prompts made without a tokenizer, for twins that ask for
    nothing, and for prompts with different numbers of operands.
    """
    ids = [one.twin_ids if twin else one.input_ids for one in prompts]
    answers = [one.twin_answer_ids if twin else one.answer_ids for one in prompts]
    if any(one is None for one in [*ids, *answers]) or not ids:
        raise ValueError(
            "arithmetic_batch: some prompts have no token ids or no answer; give a tokenizer to arithmetic"
        )
    groups: dict[str, list[tuple[int, int]]] = {}
    for one in prompts:
        for role, spans in one.spans.items():
            for number, span in enumerate(spans, 1):
                groups.setdefault(role if role == "equals" else f"{role}-{number}", []).append(span)
    if any(len(spans) != len(prompts) for spans in groups.values()):
        raise ValueError("arithmetic_batch: the prompts have different numbers of operands or operators; split them")
    return PromptBatch.of_texts("arithmetic", ids, answers, groups, pad=pad)  # pyright: ignore[reportArgumentType]


def arithmetic_metrics(
    logits: Float[Tensor, "b v"], prompts: Sequence[ArithmeticPrompt]
) -> dict[str, Float[Tensor, " b"]]:
    """How well the row after each prompt predicts its result.

    logits: of the last token of every prompt. `accuracy` (1 where the answer's first token is the likeliest),
    `probability` and `log_probability` of that token, `difference` of its logit to the counterfactual answer's (nan
    where there is none), `centred` logit: less the mean over the first tokens of all answers of these prompts. A
    relative change of a raw logit is not offered: logits have no zero.
    """
    if any(one.answer_ids is None for one in prompts) or len(prompts) != len(logits):
        raise ValueError(f"arithmetic_metrics: {len(logits)} rows of logits for {len(prompts)} prompts with token ids")
    right = torch.tensor([int(one.answer_ids[0]) for one in prompts])  # pyright: ignore[reportOptionalSubscript]
    wrong = torch.tensor([-1 if one.twin_answer_ids is None else int(one.twin_answer_ids[0]) for one in prompts])
    right, wrong, logits = right.to(logits.device), wrong.to(logits.device), logits.float()
    mine = logits.gather(1, right[:, None])[:, 0]
    other = logits.gather(1, wrong.clamp(min=0)[:, None])[:, 0].masked_fill(wrong < 0, float("nan"))
    sure = logits.log_softmax(-1).gather(1, right[:, None])[:, 0]
    return {
        "accuracy": (logits.argmax(-1) == right).float(),
        "probability": sure.exp(),
        "log_probability": sure,
        "difference": mine - other,
        "centred": mine - logits[:, right.unique()].mean(-1),
    }


def _check(n: int, ops: str, digits: int, operands: int, templates: list[str], twin: str, letters: bool) -> None:
    allowed = "<>" if letters else "+-*/"
    if not ops or set(ops) - set(allowed) or len(set(ops)) < len(ops):
        raise ValueError(f"arithmetic: ops is {ops!r}; expected different ones of {allowed!r}")
    if digits not in (1, 2) or operands not in (2, 3) or n < 0:
        raise ValueError(f"arithmetic: n {n}, digits {digits}, operands {operands}; expected n >= 0, 1 or 2, 2 or 3")
    if unknown := [name for name in templates if name not in TEMPLATES] or not templates:
        raise ValueError(f"arithmetic: templates has {unknown!r}; expected some of {', '.join(TEMPLATES)}")
    if twin not in ("operator", "operands", "neutral"):
        raise ValueError(f"arithmetic: counterfactual is {twin!r}; expected operator, operands or neutral")
    alone = [op for op in ops if not [o for o in ops if o != op and (operands == 2 or _class(o) == _class(op))]]
    if twin == "operator" and alone:
        raise ValueError(
            f"arithmetic: counterfactual 'operator' needs another operator beside {alone[0]!r} in ops {ops!r}"
            + (" that may stand beside the same ones (+ and -, or * and /)" if operands == 3 else "")
        )


def _class(operator: str) -> str:
    return next((kind for kind in CLASSES if operator in kind), "<>")


Problem = tuple[list[str], list[str]]  # operands, operators


def _draw(
    rng: random.Random, template: str, ops: str, first: str, digits: int, operands: int, twin: str, letters: bool
) -> tuple[Problem, str, Problem, str] | None:
    """A problem, its answer, the counterfactual problem and its answer; None where the draw is no good."""
    same = letters or template == "noun"  # one word for the whole problem
    kin = [op for op in ops if _class(op) == _class(first)]
    operators = [first] if same or operands == 2 else [first, rng.choice(kin)]
    pool = list(LETTERS) if letters else [str(i) for i in (range(10) if digits == 1 else range(10, 100))]
    values = rng.sample(pool, operands) if letters else rng.choices(pool, k=operands)
    if first == "/":  # exact divisions are rare among even draws
        divisor = int(rng.choice([one for one in pool if one != "0"]))
        values[:2] = [rng.choice([one for one in pool if int(one) % divisor == 0]), str(divisor)]
    answer = _result(values, operators, operands)
    if answer is None:
        return None
    other_values, other_operators = list(values), list(operators)
    if twin == "neutral":
        return (values, operators), answer, (values, [NEUTRAL] * len(operators)), ""
    if twin == "operator":
        at = rng.randrange(len(operators))
        others = [op for op in (ops if operands == 2 else kin) if op != operators[at]]
        other_operators[at] = rng.choice(others)
    else:
        at = rng.randrange(operands)
        for one in rng.sample(pool, len(pool)):
            other_values[at] = one
            if one not in values and _result(other_values, operators, operands) is not None:
                break
    other = _result(other_values, other_operators, operands)
    if other is None or other == answer:
        return None
    return (values, operators), answer, (other_values, other_operators), other


def _result(values: list[str], operators: list[str], operands: int) -> str | None:
    """What comes out from left to right; None for inexact divisions and negative numbers."""
    if operators[0] in "<>":
        return values[0] if operators[0] == "<" else values[-1]
    signs = operators if len(operators) == operands - 1 else operators * (operands - 1)
    total = int(values[0])
    for sign, text in zip(signs, values[1:], strict=True):
        value = int(text)
        if sign == "/":
            if value == 0 or total % value:
                return None
            total //= value
        else:
            total = total + value if sign == "+" else total - value if sign == "-" else total * value
        if total < 0:
            return None
    return str(total)


def _tell(template: str, values: list[str], operators: list[str], letters: bool) -> list[tuple[str, str]]:
    """The pieces of a prompt with their roles; the role "" is none."""
    between = {"symbols": ", ", "words": " and ", "noun": " and ", "question": " and "}[template]
    if letters or template == "noun":
        word = OPERATORS["letters" if letters else "noun"][operators[0]]
        listed: list[tuple[str, str]] = []
        for number, value in enumerate(values):
            joint = "" if number == 0 else between if number == len(values) - 1 else ", "
            listed += [("", joint), ("operand", value)]
        start, end = {
            "symbols": ("{}: ", " ="),
            "words": ("{} of ", " equals"),
            "noun": ("The {} of ", " is"),
            "question": ("Q: What is the {} of ", "? A:"),
        }[template]
        front, behind = start.split("{}")
        return [("", front), ("operator", word), ("", behind), *listed, *_equals(end)]
    words = OPERATORS["symbols" if template == "symbols" else "words"]
    told: list[tuple[str, str]] = [("", "Q: What is ")] if template == "question" else []
    for number, value in enumerate(values):
        if number:
            told += [("", " "), ("operator", words[operators[number - 1]]), ("", " ")]
        told.append(("operand", value))
    return [*told, *_equals({"symbols": " =", "words": " equals", "question": "? A:"}[template])]


def _equals(end: str) -> list[tuple[str, str]]:
    space = end.rfind(" ") + 1  # "? A:" answers at "A:"
    return [("", end[:space]), ("equals", end[space:])]


def _written(
    template: str, problem: Problem, answer: str, twin: Problem, other: str, letters: bool, before: str, tokenizer: Any
) -> ArithmeticPrompt | None:
    """The prompt in words and tokens; None where the two are not of equal length or start their answers alike."""
    texts, spans = [], []
    for values, operators in (problem, twin):
        text, roles = before, {"operand": [], "operator": [], "equals": []}
        for role, piece in _tell(template, values, operators, letters):
            if role:
                roles[role].append((len(text), len(text) + len(piece)))
            text += piece
        texts.append(text)
        spans.append({role: tuple(found) for role, found in roles.items()})
    answers = [f" {answer}", f" {other}" if other else ""]
    given: dict[str, Any] = {}
    if tokenizer is not None:
        coded = [_coded(tokenizer, *pair) for pair in zip(texts, answers, strict=True)]
        first, second = coded
        if first is None or second is None:
            return None
        (ids, tail, offsets), (twin_ids, twin_tail, twin_offsets) = first, second
        places = [
            {role: tuple(_tokens(at, *span) for span in found) for role, found in roles.items()}
            for roles, at in zip(spans, (offsets, twin_offsets), strict=True)
        ]
        if len(ids) != len(twin_ids) or places[0] != places[1]:
            return None
        places[0]["equals"] = ((places[0]["equals"][0][0], len(ids)),)
        if len(twin_tail) and int(tail[0]) == int(twin_tail[0]):
            return None
        spans[0] = places[0]
        given = {"input_ids": ids, "twin_ids": twin_ids, "answer_ids": tail}
        given["twin_answer_ids"] = twin_tail if other else None
    return ArithmeticPrompt(
        template, texts[0], answers[0], texts[1], answers[1], tuple(problem[0]), tuple(problem[1]), spans[0], **given
    )


def _coded(tokenizer: Any, text: str, answer: str) -> tuple[Tensor, Tensor, list[tuple[int, int]]] | None:
    """Tokens of a prompt and of its answer, and the prompt's offsets; None where the answer changes them."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"arithmetic: the tokenizer ({type(tokenizer).__name__}) gives no offsets, so spans are unknown; use its "
            "fast version"
        )
    ids, offsets = _open_ended(tokenizer, text)
    # Some tokenizers write the space before a number as a token of its own: it predicts the number, so it is given.
    # Found on a digit, so that a counterfactual without an answer gets it too.
    spaced, places = _open_ended(tokenizer, f"{text} 7")
    if len(spaced) > len(ids) + 1 and spaced[: len(ids)] == ids and places[len(ids)][1] <= len(text) + 1:
        ids, offsets = spaced[: len(ids) + 1], places[: len(ids) + 1]
    both, _ = _open_ended(tokenizer, text + answer)
    if answer and (both[: len(ids)] != ids or len(both) == len(ids)):
        return None
    return torch.tensor(ids), torch.tensor(both[len(ids) :] if answer else [], dtype=torch.long), offsets


def _open_ended(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and offsets without the end that some tokenizers put behind."""
    made = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = list(made["input_ids"]), [(int(a), int(b)) for a, b in made["offset_mapping"]]
    ended = len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None)
    return (ids[:-1], offsets[:-1]) if ended else (ids, offsets)


def _tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold characters `start` to `end`."""
    held = [index for index, (a, b) in enumerate(offsets) if a < end and start < b and a < b]
    return (held[0], held[-1] + 1) if held else (0, 0)
