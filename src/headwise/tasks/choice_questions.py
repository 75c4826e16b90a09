"""Multiple choice with its answer left open: where labels and texts stand, minimal pairs, mutated labels, metrics.

In symbols (`choice_prompts`) and in text for any tokenizer (`written_choices`). What is asked is the label alone: the
prompt says which text is right by asking for it, or the reader is taken to know.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.tasks.episodes import distinct
from headwise.tasks.symbols import Symbols

__all__ = ["LABELLINGS", "ChoicePrompts", "ChoiceQuestion", "choice_prompts", "written_choices"]

LABELLINGS = ("standard", "random", "digits", "permuted")


@dataclass(frozen=True)
class ChoicePrompts:
    """b prompts of n options each; the last row's output is the answer.

    real: False at padding (on the left). labels: the ids of the labels, in the order of the options. label_at: where
    they stand. text_at: [start, end) of every option's text. question: [start, end) of what is asked. right: the index
    of the right option.
    """

    input_ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    labels: Int[Tensor, "b n"]
    label_at: Int[Tensor, "b n"]
    text_at: Int[Tensor, "b n 2"]
    question: Int[Tensor, "b 2"]
    right: Int[Tensor, " b"]

    def __post_init__(self) -> None:
        b, n = self.labels.shape
        if n < 2:
            raise ValueError(f"ChoicePrompts: {n} option; a choice, and its metrics, need at least 2")
        if bool(((self.right < 0) | (self.right >= n)).any()):
            worst = int(self.right[(self.right < 0) | (self.right >= n)][0])
            raise ValueError(f"ChoicePrompts: right is {worst}; the options have indices 0 to {n - 1}")
        if any(len(part) != b for part in (self.input_ids, self.real, self.label_at, self.text_at, self.right)):
            raise ValueError(f"ChoicePrompts: labels of {b} prompts but other parts of more or fewer; they must match")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answers(self) -> Int[Tensor, " b"]:
        """The id of the right label."""
        return self.labels.gather(1, self.right[:, None])[:, 0]

    def part(self, chosen: slice | Int[Tensor, " m"] | Bool[Tensor, " b"]) -> "ChoicePrompts":
        """Some of the prompts."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        if bool(self.real.all()):
            return {"input_ids": self.input_ids}
        position = (self.real.long().cumsum(-1) - 1).clamp_min(0)
        return {"input_ids": self.input_ids, "attention_mask": self.real.long(), "position_ids": position}

    def chosen(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
        """The option whose label has the highest logit: the model's answer among the labels on offer."""
        return logits.gather(1, self.labels.to(logits.device)).argmax(1).to(self.right.device)

    def accuracy(self, logits: Float[Tensor, "b v"]) -> dict[str, float]:
        """`labels`: share right among the labels on offer; `all`: share right among all tokens; `loss`: mean nats
        of the right label among the labels on offer."""
        among = logits.gather(1, self.labels.to(logits.device)).float().cpu()
        loss = torch.nn.functional.cross_entropy(among, self.right)
        return {
            "labels": float((among.argmax(1) == self.right).double().mean()),
            "all": float((logits.argmax(1).cpu() == self.answers).double().mean()),
            "loss": float(loss),
        }

    def groups(self, index: Int[Tensor, " b"] | None = None) -> dict[str, Bool[Tensor, "b t"]]:
        """Parts of the prompts as masks over their tokens, for `heads.group_mass`.

        `right-label`, `wrong-labels`, `labels`, `right-text`, `wrong-texts`, `question`, `first` (the first real
        token), `last` (the last two), and `label-0`, ... by index. index: whose label and text count as right; None is
        the right option, the model's own answers ask what its heads do when it errs.
        """
        right = self.right if index is None else index
        b, n = self.labels.shape
        t = self.input_ids.shape[1]
        columns = torch.arange(t)
        label = columns == self.label_at[..., None]  # b n t
        text = (columns >= self.text_at[..., :1]) & (columns < self.text_at[..., 1:])
        own = torch.nn.functional.one_hot(right, n).bool()[..., None]
        first = self.real.int().argmax(-1, keepdim=True)
        return {
            "right-label": (label & own).any(1),
            "wrong-labels": (label & ~own).any(1),
            "labels": label.any(1),
            "right-text": (text & own).any(1),
            "wrong-texts": (text & ~own).any(1),
            "question": (columns >= self.question[:, :1]) & (columns < self.question[:, 1:]),
            "first": columns == first,
            "last": (columns >= t - 2).expand(b, t),
            **{f"label-{i}": label[:, i] for i in range(n)},
        }


def choice_prompts(
    batch: int,
    symbols: Symbols | None = None,
    *,
    options: int = 4,
    labels: str | Sequence[str] = "standard",
    order: str = "text-first",
    without_text: bool = False,
    right: Int[Tensor, " b"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[ChoicePrompts, ChoicePrompts]:
    """Prompts `<bos> OPT a L b M c N d O ANS Q x`, and their twins, which ask for another option and differ in x alone.

    labels: `standard` A, B, C, D in order; `permuted` the same in an order drawn for every prompt; `random` and
    `digits` drawn from eight letters and ten digits; or names of your own, in order. order: `text-first` or
    `label-first`. without_text: a full stop in place of every option's text, so that nothing tells which is right.
    right: the right option of every prompt; None draws it.
    """
    symbols = Symbols() if symbols is None else symbols
    where = "choice_prompts"
    if order not in ("text-first", "label-first"):
        raise ValueError(f"{where}: order is {order!r}; choose text-first or label-first")
    if batch < 1 or not 2 <= options <= len(symbols.labels):
        raise ValueError(
            f"{where}: {batch} prompts of {options} options; give at least 1 of 2 to {len(symbols.labels)}"
        )
    tags = _tags(where, batch, symbols, options, labels, generator)
    texts = distinct(symbols.plain_words, batch, options, generator)
    drawn = torch.rand(batch, options, generator=generator).argsort(1)
    if right is None:
        right = drawn[:, 0]
    elif right.shape != (batch,) or bool(((right < 0) | (right >= options)).any()):
        raise ValueError(f"{where}: right is {right.tolist()}; give {batch} indices from 0 to {options - 1}")
    other = torch.where(drawn[:, 0] == right, drawn[:, 1], drawn[:, 0])
    shown = symbols.ids(".").expand(batch, options) if without_text else texts
    listed = torch.stack([shown, tags] if order == "text-first" else [tags, shown], 2).flatten(1)
    text = 2 * torch.arange(options) + 2 + int(order == "label-first")
    label = 2 * torch.arange(options) + 2 + int(order == "text-first")

    def tell(which: Int[Tensor, " b"]) -> ChoicePrompts:
        def mark(name: str) -> Tensor:
            return symbols.ids(name).expand(batch, 1)

        bos = torch.full((batch, 1), symbols.bos)
        asked = texts.gather(1, which[:, None])
        ids = torch.cat([bos, mark("OPT"), listed, mark("ANS"), mark("Q"), asked], 1)
        at = ids.shape[1] - 1
        return ChoicePrompts(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            tags,
            label.expand(batch, -1),
            torch.stack([text, text + 1], 1).expand(batch, -1, -1),
            torch.tensor([at, at + 1]).expand(batch, 2),
            which,
        )

    return tell(right), tell(other)


def _tags(
    where: str, batch: int, symbols: Symbols, options: int, labels: str | Sequence[str], generator: Any
) -> Int[Tensor, "b n"]:
    if not isinstance(labels, str):
        tags = symbols.ids(labels)
        if len(tags) != options or len(tags.unique()) != options:
            raise ValueError(f"{where}: labels are {list(labels)} for {options} options; give one of its own for each")
        return tags.expand(batch, -1)
    if labels not in LABELLINGS:
        raise ValueError(f"{where}: labels is {labels!r}; choose from {', '.join(LABELLINGS)}, or give the labels")
    first = symbols.labels[:options]
    if labels == "standard":
        return first.expand(batch, -1)
    pool = {"random": symbols.labels, "digits": symbols.digits, "permuted": first}[labels]
    return distinct(pool, batch, options, generator)


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question in words, the texts of its options, and which is right."""

    question: str
    options: tuple[str, ...]
    right: int

    def __post_init__(self) -> None:
        where = f"ChoiceQuestion {self.question[:40]!r}"
        if len(self.options) < 2:
            raise ValueError(f"{where}: {len(self.options)} option; a choice needs at least 2")
        if len(set(self.options)) != len(self.options):
            twice = next(text for text in self.options if self.options.count(text) > 1)
            raise ValueError(f"{where}: two options have the text {twice!r}; which is right could not be told")
        if not 0 <= self.right < len(self.options):
            raise ValueError(f"{where}: right is {self.right}; the options have indices 0 to {len(self.options) - 1}")


def written_choices(
    questions: Sequence[ChoiceQuestion],
    tokenizer: Any,
    *,
    labels: Sequence[str] | Callable[[int], Sequence[str]] = "ABCD",
    brackets: str = "()",
    without_text: bool = False,
    examples: Sequence[ChoiceQuestion] = (),
) -> ChoicePrompts:
    r"""Questions in words, `Q\n(A) one\n(B) two\nAnswer: (`, for any fast tokenizer.

    labels: one string for each option (a string gives its characters), the same for all questions, or a function from
    the number of a question to its labels (random or permuted ones). brackets: around a label: "()", "[]", or one
    character behind it (")", ".", ":"). without_text: the labels alone. examples: solved ones in front, with the same
    labels.

    Raises ValueError for a label that is several tokens where it must be said, labels that are too few or alike, and
    questions with different numbers of options.
    """
    where = "written_choices"
    if not questions:
        raise ValueError(f"{where}: questions is empty; give at least one")
    if len({len(one.options) for one in [*questions, *examples]}) > 1:
        raise ValueError(f"{where}: the questions have different numbers of options; ask those of one number at a time")
    if len(brackets) not in (1, 2):
        raise ValueError(f"{where}: brackets is {brackets!r}; give two characters, or one that follows the label")
    left, close = (brackets[0], brackets[1]) if len(brackets) == 2 else ("", brackets)
    rows = []
    for number, asked in enumerate(questions):
        named = list(labels(number) if callable(labels) else labels)[: len(asked.options)]
        if len(named) != len(asked.options) or len(set(named)) != len(named):
            raise ValueError(f"{where}: labels are {named} for {len(asked.options)} options; give one of its own each")
        text = "".join(
            _told(one, named, left, close, without_text)[0] + named[one.right] + close + "\n\n" for one in examples
        )
        body, spans = _told(asked, named, left, close, without_text)
        moved = {name: [(a + len(text), z + len(text)) for a, z in found] for name, found in spans.items()}
        rows.append(_tokens(where, tokenizer, text + body, named, moved, asked.right))
    return _padded(rows, tokenizer)


def _told(
    asked: ChoiceQuestion, labels: Sequence[str], left: str, close: str, without_text: bool
) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """The prompt up to its answer, and where things stand in it, in characters."""
    text = asked.question
    spans: dict[str, list[tuple[int, int]]] = {"question": [(0, len(text))], "label": [], "text": []}
    for label, option in zip(labels, asked.options, strict=True):
        text += f"\n{left}"
        spans["label"].append((len(text), len(text) + len(label)))
        text += label + close
        shown = "" if without_text else " " + option
        spans["text"].append((len(text) + bool(shown), len(text) + len(shown)))
        text += shown
    return text + (f"\nAnswer: {left}" if left else "\nAnswer:"), spans


def _tokens(
    where: str,
    tokenizer: Any,
    text: str,
    labels: Sequence[str],
    spans: Mapping[str, list[tuple[int, int]]],
    right: int,
) -> dict[str, Any]:
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def covering(start: int, stop: int) -> tuple[int, int]:
        inside = [i for i, (a, z) in enumerate(offsets) if a < max(stop, start + 1) and z > start and z > a]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    answer = []
    gap = "" if text.endswith(("(", "[", "{", "<")) else " "
    for label in labels:
        told = list(tokenizer(text + gap + label)["input_ids"])
        if told[: len(ids)] != ids or len(told) != len(ids) + 1:
            raise ValueError(
                f"{where}: label {label!r} is {len(told) - len(ids)} tokens behind {text[-10:]!r}, or joins the token "
                "before it; choose labels and brackets that this tokenizer says in one token"
            )
        answer.append(told[-1])
    label_at = [covering(*span)[1] - 1 for span in spans["label"]]
    text_at = [covering(*span) if span[1] > span[0] else (0, 0) for span in spans["text"]]
    return {
        "ids": ids,
        "labels": answer,
        "label_at": label_at,
        "text_at": text_at,
        "question": covering(*spans["question"][0]),
        "right": right,
    }


def _padded(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> ChoicePrompts:
    width = max(len(row["ids"]) for row in rows)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    shift = [width - len(row["ids"]) for row in rows]
    ids = torch.tensor([[pad] * by + row["ids"] for by, row in zip(shift, rows, strict=True)])
    moved = torch.tensor(shift)
    text_at = torch.tensor([row["text_at"] for row in rows])
    text_at = torch.where(text_at[..., 1:] > 0, text_at + moved[:, None, None], text_at)
    return ChoicePrompts(
        ids,
        torch.arange(width) >= moved[:, None],
        torch.tensor([row["labels"] for row in rows]),
        torch.tensor([row["label_at"] for row in rows]) + moved[:, None],
        text_at,
        torch.tensor([row["question"] for row in rows]) + moved[:, None],
        torch.tensor([row["right"] for row in rows]),
    )
