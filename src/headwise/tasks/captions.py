"""Pictures of four shapes with captions and yes-or-no questions: where what is usual and what is there can part.

A picture is a grid of 4 x 4 cells of 8 x 8 pixels; four of the cells hold a shape, white on black, and Gaussian noise
lies over everything. The caption names the shapes in reading order. In the ordinary pictures a shape is followed by its
typical successor with probability 0.9, so that a model that learns captions learns a prior over words; in the
counterfactual pictures it never is, and whoever names the typical successor there has not looked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "PICTURE_MEAN",
    "PICTURE_STD",
    "QUESTION_KINDS",
    "SHAPE_WORDS",
    "CaptionedShapes",
    "ShapeQuestions",
    "shapes_captions",
]

GRID, CELL, OBJECTS = 4, 8, 4
PRIOR = 0.9
# How often a shape comes first, in parts of 14: shapes 1 to 4 become popular, shapes 6, 7 and 0 rare.
FIRST = (3, 3, 2, 2, 1, 1, 1, 1)
PICTURE_MEAN, PICTURE_STD = 0.45, 0.08
"""An image is `mean + std * (shape + noise)`, cut off at 0 and 1: a picture to look at, and what a processor undoes."""

QUESTION_KINDS = ("random", "popular", "adversarial")
"""Which absent shape is asked for: any; the one that is most often in ordinary pictures; the typical successor of a
shape that is there. As POPE does it."""

GLYPHS = {
    "disc": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "ring": "..####.. .##..##. ##....## ##....## ##....## ##....## .##..##. ..####..",
    "square": "######## ##....## ##....## ##....## ##....## ##....## ##....## ########",
    "cross": "##....## .##..##. ..####.. ...##... ...##... ..####.. .##..##. ##....##",
    "plus": "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",
    "stripes": "######## ........ ######## ........ ######## ........ ######## ........",
    "arrow": "...##... ..####.. .######. ######## ...##... ...##... ...##... ...##...",
    "hook": "##...... ##...... ##...... ##...... ##...... ##...... ######## ########",
}
SHAPE_WORDS = tuple(GLYPHS)


def glyphs() -> Float[Tensor, "8 8 8"]:
    """The eight shapes, 1 on a shape and 0 beside it. The typical successor of shape k is k + 1; of the last, 0."""
    return torch.tensor([[[float(p == "#") for p in row] for row in rows.split()] for rows in GLYPHS.values()])


@dataclass(frozen=True)
class ShapeQuestions:
    """One question a scene: is there a shape of number `shape`? `answer` is True for yes. Texts by `texts()`."""

    shape: Int[Tensor, " n"]
    answer: Bool[Tensor, " n"]

    def texts(self) -> list[str]:
        """As the models read them: "is there a ring ?"."""
        return [f"is there a {SHAPE_WORDS[int(k)]} ?" for k in self.shape]


@dataclass(frozen=True)
class CaptionedShapes:
    """n pictures of four shapes each.

    image: grey level in [0, 1], equal in the three channels. shapes: number of each shape in reading order (an index
    into `SHAPE_WORDS`; a shape may be there twice). cells: where it is, 0 to 15 in reading order.
    """

    image: Float[Tensor, "n 3 side side"]
    shapes: Int[Tensor, "n k"]
    cells: Int[Tensor, "n k"]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: slice | Tensor) -> "CaptionedShapes":
        return CaptionedShapes(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    @property
    def pixel_values(self) -> Float[Tensor, "n 3 side side"]:
        """What a model of the `vision-language` kind takes: shapes are 1, ground is 0, noise has its own size."""
        return (self.image - PICTURE_MEAN) / PICTURE_STD

    @property
    def present(self) -> Bool[Tensor, "n 8"]:
        """Which shapes a picture holds."""
        return torch.zeros(len(self), len(SHAPE_WORDS)).scatter(1, self.shapes, 1.0).bool()

    @property
    def typical(self) -> Int[Tensor, "n k"]:
        """The typical successor of each shape: what the next word would be if nobody looked."""
        return (self.shapes + 1) % len(SHAPE_WORDS)

    def captions(self) -> list[str]:
        """ "disc , ring , square , cross": the shapes in reading order."""
        return [" , ".join(SHAPE_WORDS[int(k)] for k in row) for row in self.shapes]

    def objects(self) -> list[set[str]]:
        """The words of the shapes of each picture, as `chair` and `polling` take them."""
        return [{SHAPE_WORDS[int(k)] for k in row} for row in self.shapes]

    def questions(self, kind: str | None, generator: torch.Generator) -> ShapeQuestions:
        """A question for each picture. kind: None asks for a shape that is there, the others (`QUESTION_KINDS`) for one
        that is not.

        Raises ValueError for another kind.
        """
        if kind is not None and kind not in QUESTION_KINDS:
            raise ValueError(f"questions: kind is {kind!r}; expected None or one of {', '.join(QUESTION_KINDS)}")
        here = self.present
        if kind is None:
            weights = here.float()
        elif kind == "random":
            weights = (~here).float()
        elif kind == "popular":
            most = torch.where(here, -1.0, popularity()).argmax(1)
            weights = torch.nn.functional.one_hot(most, len(SHAPE_WORDS)).float()
        else:
            weights = (here.roll(1, 1) & ~here).float()
        return ShapeQuestions(
            torch.multinomial(weights, 1, generator=generator)[:, 0],
            torch.full((len(self),), kind is None),
        )


def popularity() -> Float[Tensor, " 8"]:
    """How often a shape is in an ordinary picture, counted along the chain of typical successors."""
    first = torch.tensor(FIRST, dtype=torch.float) / sum(FIRST)
    return torch.stack([first.roll(step) for step in range(OBJECTS)]).sum(0)


def shapes_captions(
    n: int,
    *,
    sigma: float = 1.2,
    prior: float = PRIOR,
    counterfactual: bool = False,
    empty: Sequence[int] = (),
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> CaptionedShapes:
    """Draw n pictures.

    sigma: the noise's standard deviation, where a shape is 1 above the ground. prior: how often the typical successor
    follows; otherwise any shape does, the typical one included. counterfactual: the typical successor never follows,
    any other shape does with equal probability. empty: cells that never hold a shape. seed or generator: one of the
    two.
    Raises ValueError for n below 1, sigma below 0, a prior outside [0, 1], empty cells that are none or leave less than
    four, and for none or both of seed and generator.
    """
    if n < 1:
        raise ValueError(f"shapes_captions: n is {n}; it must be at least 1")
    if not sigma >= 0:
        raise ValueError(f"shapes_captions: sigma is {sigma}; it must be 0 or more")
    if not 0 <= prior <= 1:
        raise ValueError(f"shapes_captions: prior is {prior}; it must be within 0 and 1")
    free = [cell for cell in range(GRID * GRID) if cell not in empty]
    if len(free) < OBJECTS or not set(empty) <= set(range(GRID * GRID)):
        raise ValueError(
            f"shapes_captions: empty is {tuple(empty)}; give at most {GRID * GRID - OBJECTS} cells of 0 to "
            f"{GRID * GRID - 1}"
        )
    if (seed is None) == (generator is None):
        raise ValueError("shapes_captions: give either seed or generator")
    if generator is None:
        generator = torch.Generator().manual_seed(int(seed or 0))
    options: dict[str, Any] = {"generator": generator}
    kinds = len(SHAPE_WORDS)
    chosen = torch.rand(n, len(free), **options).argsort(1)[:, :OBJECTS]
    cells = torch.tensor(free)[chosen].sort(1).values
    first = torch.multinomial(torch.tensor(FIRST, dtype=torch.float), n, replacement=True, **options)
    shapes = [first]
    for _ in range(OBJECTS - 1):
        if counterfactual:
            step = torch.randint(2, kinds + 1, (n,), **options)  # any but one further
        else:
            step = torch.randint(0, kinds, (n,), **options)
            step = torch.where(torch.rand(n, **options) < prior, 1, step)
        shapes.append((shapes[-1] + step) % kinds)
    drawn = torch.stack(shapes, 1)
    grid = torch.zeros(n, GRID * GRID, CELL, CELL)
    grid[torch.arange(n)[:, None], cells] = glyphs()[drawn]
    plane = grid.view(n, GRID, GRID, CELL, CELL).permute(0, 1, 3, 2, 4).reshape(n, GRID * CELL, GRID * CELL)
    noisy = plane + sigma * torch.randn(plane.shape, **options)
    image = (PICTURE_MEAN + PICTURE_STD * noisy).clamp(0, 1)
    return CaptionedShapes(image[:, None].expand(-1, 3, -1, -1), drawn, cells)
