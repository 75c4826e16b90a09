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
    length: int | None = None,
    text: BigramBackcopy | None = None,
    generator: torch.Generator | None = None,
) -> Episodes:
    """`Q x OPT a L b M c N d O ANS` -> the label of the option equal to x; chance is 1 / options.

    order: `text-first` (as above) or `label-first` (`OPT L a M b ...`). labels: `random` draws different labels for
    every episode (the option's place alone does not tell the answer), `fixed` always uses the first ones in order.
    The twin asks for another option. Spans: `question`, `option` and `label` (the right ones), `twin-label`.
    """
    if not 2 <= options <= len(symbols.labels):
        raise ValueError(f"multiple_choice_episodes: options is {options}; expected 2 to {len(symbols.labels)}")
    if order not in ("text-first", "label-first") or labels not in ("random", "fixed"):
        raise ValueError(
            f"multiple_choice_episodes: order is {order!r} and labels {labels!r}; "
            "expected 'text-first' or 'label-first', and 'random' or 'fixed'"
        )
    texts = distinct(symbols.plain_words, batch, options, generator)
    random = labels == "random"
    tags = distinct(symbols.labels, batch, options, generator) if random else symbols.labels[:options].expand(batch, -1)
    asked = torch.rand(batch, options, generator=generator).argsort(-1)[:, :2]
    pair = [texts, tags] if order == "text-first" else [tags, texts]
    listed = torch.stack(pair, dim=2).flatten(1)

    def tell(which: torch.Tensor) -> torch.Tensor:
        def mark(name: str) -> torch.Tensor:
            return symbols.ids(name).expand(batch, 1)

        return torch.cat(
            [mark("Q"), texts.gather(1, which), mark("OPT"), listed, mark("ANS"), tags.gather(1, which)], dim=1
        )

    one, other = asked[:, 0], asked[:, 1]
    text_at, label_at = (0, 1) if order == "text-first" else (1, 0)
    spans = {
        "question": at(torch.ones(batch, dtype=torch.long)),
        "option": at(3 + 2 * one + text_at),
        "label": at(3 + 2 * one + label_at),
        "twin-label": at(3 + 2 * other + label_at),
    }
    return place(
        "multiple_choice",
        tell(asked[:, :1]),
        [2 * options + 4],
        text=text,
        length=length,
        generator=generator,
        spans=spans,
        twin=tell(asked[:, 1:]),
    )
