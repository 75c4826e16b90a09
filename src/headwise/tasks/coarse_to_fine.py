"""Scenes whose details are lost in their coarse tokens: what a region is, and the digit in one of its cells.

    fine cell = colour of its region + kind of its region + (in one cell) glyph of a digit + small noise
    coarse    = mean of the cells + noise, weak on colour and kind, so strong on the glyph that it drowns

Two questions: "kind of the <colour> region ?", which coarse tokens answer, and "digit in the <colour> region ?", which
only the cells of that region answer. Colours of a scene differ, so that a question has one answer.

Prompt: `<bos>`, a scene token for each region, `kind` or `digit`, the colour; the answer is the next token.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["CoarseToFine", "coarse_to_fine_scene"]

COLOURS, KINDS, DIGITS = 16, 4, 10
BOS, SCENE, ASK_KIND, ASK_DIGIT = range(4)
FIRST_COLOUR = 4
FIRST_KIND = FIRST_COLOUR + COLOURS
FIRST_DIGIT = FIRST_KIND + KINDS
VOCABULARY = FIRST_DIGIT + DIGITS
DIM = COLOURS + KINDS + DIGITS  # features of a token, before the rotation that mixes them
STRONG, GLYPH = 4.0, 6.0  # length of colour and kind, and of a glyph


@dataclass(frozen=True)
class CoarseToFine:
    """n scenes of c regions with r cells each, one question a scene.

    coarse, fine: features; the cells of a region lie side by side. colour, kind, digit: of each region; cell: where its
    digit stands. asked: the region. detail: 1 where the digit is asked for, 0 for the kind. ids: the prompt. answer: a
    token.
    """

    coarse: Float[Tensor, "n c f"]
    fine: Float[Tensor, "n m f"]
    colour: Int[Tensor, "n c"]
    kind: Int[Tensor, "n c"]
    digit: Int[Tensor, "n c"]
    cell: Int[Tensor, "n c"]
    asked: Int[Tensor, " n"]
    detail: Int[Tensor, " n"]
    ids: Int[Tensor, "n t"]
    answer: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | Tensor) -> "CoarseToFine":
        """Some of the scenes."""
        return CoarseToFine(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def asking(self, region: Int[Tensor, " n"], detail: Int[Tensor, " n"]) -> "CoarseToFine":
        """The same scenes under other questions."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return CoarseToFine(**given | _question(self.colour, self.kind, self.digit, region, detail))


def coarse_to_fine_scene(
    n: int,
    *,
    regions: int = 16,
    cells: int = 4,
    details: float = 0.5,
    coarse_noise: float = 0.5,
    blur: float = 3.0,
    fine_noise: float = 0.1,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> CoarseToFine:
    """n scenes with a question each.

    regions: 2 to 16. cells: of a region, at least 2. details: share of the questions that ask for a digit, 0 to 1.
    coarse_noise, blur: deviation of what a coarse token shows of colour and kind, and of the digit. fine_noise: of each
    feature of a cell. seed or generator: what is drawn from.
    Raises ValueError for numbers out of range, and where both or neither of seed and generator are given.
    """
    if not 2 <= regions <= COLOURS:
        raise ValueError(f"coarse_to_fine_scene: regions is {regions}; expected 2 to {COLOURS}, one colour each")
    if cells < 2 or n < 1:
        raise ValueError(f"coarse_to_fine_scene: cells is {cells}, n is {n}; expected at least 2 cells and 1 scene")
    if not 0 <= details <= 1 or min(coarse_noise, blur, fine_noise) < 0:
        raise ValueError(
            f"coarse_to_fine_scene: details is {details}, noises {coarse_noise}, {blur} and {fine_noise}; expected a "
            "share from 0 to 1, and noises of 0 or more"
        )
    if (seed is None) == (generator is None):
        raise ValueError("coarse_to_fine_scene: give either a seed or a generator")
    draw = torch.Generator().manual_seed(seed or 0) if generator is None else generator
    colour = torch.rand(n, COLOURS, generator=draw).argsort(-1)[:, :regions]
    kind = torch.randint(KINDS, (n, regions), generator=draw)
    digit = torch.randint(DIGITS, (n, regions), generator=draw)
    cell = torch.randint(cells, (n, regions), generator=draw)
    one_hot = torch.nn.functional.one_hot
    shared = STRONG * torch.cat([one_hot(colour, COLOURS), one_hot(kind, KINDS)], -1)
    glyph = GLYPH * one_hot(digit, DIGITS)[:, :, None] * one_hot(cell, cells)[..., None]
    content = torch.cat([shared[:, :, None].expand(-1, -1, cells, -1), glyph], -1).float() @ _mixing()
    fine = content + fine_noise * torch.randn(content.shape, generator=draw)
    noise = torch.randn(n, regions, DIM, generator=draw)
    noise[..., : COLOURS + KINDS] *= coarse_noise
    noise[..., COLOURS + KINDS :] *= blur
    coarse = fine.mean(2) + noise @ _mixing()
    asked = torch.randint(regions, (n,), generator=draw)
    detail = (torch.rand(n, generator=draw) < details).long()
    question = _question(colour, kind, digit, asked, detail)
    return CoarseToFine(coarse, fine.flatten(1, 2), colour, kind, digit, cell, **question)


def _question(colour: Tensor, kind: Tensor, digit: Tensor, asked: Tensor, detail: Tensor) -> dict[str, Tensor]:
    n, regions = colour.shape
    at = lambda x: x.gather(1, asked[:, None])[:, 0]  # noqa: E731
    ids = torch.full((n, regions + 3), SCENE)
    ids[:, 0], ids[:, -2], ids[:, -1] = BOS, torch.where(detail == 1, ASK_DIGIT, ASK_KIND), FIRST_COLOUR + at(colour)
    answer = torch.where(detail == 1, FIRST_DIGIT + at(digit), FIRST_KIND + at(kind))
    return {"asked": asked, "detail": detail, "ids": ids, "answer": answer}


def _mixing() -> Tensor:
    """A fixed rotation: no feature stands for one fact."""
    generator = torch.Generator().manual_seed(20241202)
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)).Q.float()
