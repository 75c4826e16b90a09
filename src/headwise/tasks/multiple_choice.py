"""Multiple choice in symbols: which letter stands beside the option that equals the question?"""

import torch

from headwise.tasks.bigram_backcopy import BigramBackcopy
from headwise.tasks.episodes import Episodes, at, distinct, place
from headwise.tasks.symbols import Symbols

__all__ = ["multiple_choice_episodes"]


def multiple_choice_episodes(
    batch: int,
    symbols: Symbols,
    *,
    options: int = 4,
    order: str = "text-first",
    labels: str = "random",
    question: str = "first",
    asks: int = 1,
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`Q x OPT a L b M c N d O ANS` -> the label of the option equal to x; chance is 1 / options.

    order: `text-first` (as above) or `label-first` (`OPT L a M b ...`). labels: `random` draws different labels for
    every episode (the option's place alone does not tell the answer), `fixed` always uses the first ones in order.
    question: `first` (as above) or `last` (`OPT a L b M c N d O Q x ANS`). asks: so many questions about one list,
    each about another option (more than one only with the question last): `OPT ... Q x ANS L Q y ANS`.
    The twin asks for another option at its end. Spans, of the last question: `question`, `option` and `label` (the right ones), `twin-label`.
    """
    if not 2 <= options <= len(symbols.labels):
        raise ValueError(f"multiple_choice_episodes: options is {options}; expected 2 to {len(symbols.labels)}")
    if order not in ("text-first", "label-first") or labels not in ("random", "fixed"):
        raise ValueError(
            f"multiple_choice_episodes: order is {order!r} and labels {labels!r}; "
            "expected 'text-first' or 'label-first', and 'random' or 'fixed'"
        )
    if question not in ("first", "last"):
        raise ValueError(f"multiple_choice_episodes: question is {question!r}; expected 'first' or 'last'")
    if not 1 <= asks <= (1 if question == "first" else options - 1):
        raise ValueError(
            f"multiple_choice_episodes: asks is {asks}; expected 1, or up to {options - 1} with question='last'"
        )
    texts = distinct(symbols.plain_words, batch, options, generator)
    random = labels == "random"
    tags = distinct(symbols.labels, batch, options, generator) if random else symbols.labels[:options].expand(batch, -1)
    drawn = torch.rand(batch, options, generator=generator).argsort(-1)
    pair = [texts, tags] if order == "text-first" else [tags, texts]
    listed = torch.stack(pair, dim=2).flatten(1)

    def mark(name: str) -> torch.Tensor:
        return symbols.ids(name).expand(batch, 1)

    def tell(which: torch.Tensor) -> torch.Tensor:
        told = [mark("OPT"), listed]
        for one in which.split(1, dim=1):
            asked = [mark("Q"), texts.gather(1, one)]
            told = [*asked, *told] if question == "first" else [*told, *asked]
            told += [mark("ANS"), tags.gather(1, one)]
        return torch.cat(told, dim=1)

    one, other = drawn[:, asks - 1], drawn[:, asks]
    text_at, label_at = (0, 1) if order == "text-first" else (1, 0)
    size = 2 * options + 1  # OPT and the list
    asked_at, listed_at = (1, 3) if question == "first" else (size + 4 * asks - 3, 1)
    spans = {
        "question": at(torch.full((batch,), asked_at)),
        "option": at(listed_at + 2 * one + text_at),
        "label": at(listed_at + 2 * one + label_at),
        "twin-label": at(listed_at + 2 * other + label_at),
    }
    return place(
        "multiple_choice",
        tell(drawn[:, :asks]),
        [size + 4 * number + 3 for number in range(asks)],
        text=text,
        length=length,
        generator=generator,
        spans=spans,
        twin=tell(torch.cat([drawn[:, : asks - 1], other[:, None]], dim=1)),
    )
