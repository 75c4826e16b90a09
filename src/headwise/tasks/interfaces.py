"""Generated interfaces: icons in rows of four panels, and instructions that need more or less of that structure.

A screen is a grid of 4 x 4 cells in four panels (its quadrants). A panel has a colour, seen in its title bar or its
border, and two rows of two cells, one of them light. Icons are shapes of the scenes (`tasks.scene_shapes`) in a colour.

- easy: the named shape is there once ("disc"; at times panel and row are named though nobody needs them);
- hard: it is in several panels, and the panel's colour tells which is meant ("disc in red panel");
- nested: it is also twice in that panel, and the row tells ("disc in light row of red panel").
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.tasks.scene_shapes import SHAPES, coverage, hsv_to_rgb, object_frame

__all__ = ["GUI_KINDS", "GUI_WORDS", "GuiScreens", "gui_screens"]

GUI_KINDS = ("easy", "hard", "nested")
GRID, CELL, PANELS = 4, 12, 4
SIDE = GRID * CELL
ICONS = tuple(SHAPES)
PANEL_COLOURS = {"red": 0.0, "yellow": 0.16, "green": 0.36, "blue": 0.63}  # hues
ICON_COLOURS = {"white": (1.0, 1.0, 1.0), "cyan": (0.3, 0.9, 0.9), "pink": (1.0, 0.5, 0.8), "orange": (1.0, 0.6, 0.2)}
CORNERS = ("topleft", "topright", "bottomleft", "bottomright")
ROWS = ("upper", "lower")
SHADES = ("dark", "light")
GREY = (0.08, 0.34)  # of a dark and of a light row
EMPTY = "nothing"
NAMED = (0.5, 0.25, 0.25)  # easy instructions that name the shape alone, the panel too, the row too

GUI_WORDS = (
    *ICONS, *PANEL_COLOURS, *ICON_COLOURS, *CORNERS, *ROWS, *SHADES, EMPTY, "in", "row", "of", "panel",
    "125", "375", "625", "875",
)  # fmt: skip
"""Every word of instructions, summaries, analyses and points."""


@dataclass(frozen=True)
class GuiScreens:
    """n screens. Cells count from 0 to 15 in reading order, panels from 0 to 3.

    image: in [0, 1]. shapes: of each cell, an index into the scenes' shapes; -1 is empty. colours: of each icon.
    panels: colour of each panel. light: which row of each panel is light, 0 upper, 1 lower. target: the cell that is
    meant. kind: index into `GUI_KINDS`. named: 0 the shape alone, 1 the panel too, 2 the row too.
    """

    image: Float[Tensor, "n 3 side side"]
    shapes: Int[Tensor, "n 16"]
    colours: Int[Tensor, "n 16"]
    panels: Int[Tensor, "n 4"]
    light: Int[Tensor, "n 4"]
    target: Int[Tensor, " n"]
    kind: Int[Tensor, " n"]
    named: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: slice | Tensor) -> "GuiScreens":
        return GuiScreens(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    @property
    def pixel_values(self) -> Float[Tensor, "n 3 side side"]:
        """What a model takes: about zero mean and unit size."""
        return (self.image - 0.25) / 0.25

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """x1, y1, x2, y2 of the cell that is meant, as shares of the sides."""
        return cell_boxes(self.target)

    def kinds(self) -> list[str]:
        """The kind of each screen, as groups of `click_accuracy`."""
        return [GUI_KINDS[int(kind)] for kind in self.kind]

    def instructions(self) -> list[str]:
        """ "disc", "disc in red panel" or "disc in light row of red panel"."""
        return [self.instruction(row, int(self.target[row]), int(self.named[row])) for row in range(len(self))]

    def instruction(self, row: int, cell: int, named: int) -> str:
        """What asks for a cell of a screen. named: 0 the shape alone, 1 the panel too, 2 the row too."""
        panel, words = panel_of(cell), ICONS[int(self.shapes[row, cell])]
        if named > 0:
            of = f"{SHADES[int(self.light[row, panel] == row_of(cell))]} row of " if named > 1 else ""
            words += f" in {of}{list(PANEL_COLOURS)[int(self.panels[row, panel])]} panel"
        return words

    def listings(self) -> list[str]:
        """The shapes of all cells in reading order."""
        return [" ".join(ICONS[k] if k >= 0 else EMPTY for k in row) for row in self.shapes.tolist()]

    def summaries(self) -> list[str]:
        """The interface in short: the colours of its panels in reading order."""
        colours = list(PANEL_COLOURS)
        return [" ".join(colours[k] for k in row) for row in self.panels.tolist()]

    def analyses(self, cells: Int[Tensor, " n"] | None = None) -> list[str]:
        """A cell's region (panel, corner, row), its looks, and the icon beside it. cells: None is what is meant."""
        colours, looks, texts = list(PANEL_COLOURS), list(ICON_COLOURS), []
        for row, cell in enumerate((self.target if cells is None else cells).tolist()):
            panel, half = panel_of(cell), row_of(cell)
            beside = int(self.shapes[row, cell ^ 1])
            texts.append(
                f"{colours[int(self.panels[row, panel])]} {CORNERS[panel]} "
                f"{SHADES[int(self.light[row, panel] == half)]} {ROWS[half]} "
                f"{looks[int(self.colours[row, cell])]} {ICONS[beside] if beside >= 0 else EMPTY}"
            )
        return texts

    def points(self) -> list[str]:
        """The middle of the cell that is meant, in thousandths of the sides: "125 375"."""
        return [point_of(cell) for cell in self.target.tolist()]

    def twins(self) -> Int[Tensor, " n"]:
        """For each screen another cell with the shape that is meant; the one that is meant where there is no other."""
        shape = self.shapes.gather(1, self.target[:, None])
        same = self.shapes == shape
        same.scatter_(1, self.target[:, None], False)
        return torch.where(same.any(1), same.int().argmax(1), self.target)


def panel_of(cell: int) -> int:
    return cell // (2 * GRID) * 2 + cell % GRID // 2


def row_of(cell: int) -> int:
    """Which row of its panel a cell is in."""
    return cell // GRID % 2


def point_of(cell: int) -> str:
    """The middle of a cell in thousandths of the sides: "125 375"."""
    return f"{125 + 250 * (cell % GRID)} {125 + 250 * (cell // GRID)}"


def cell_boxes(cells: Int[Tensor, " n"]) -> Float[Tensor, "n 4"]:
    x, y = cells % GRID, cells // GRID
    return torch.stack([x, y, x + 1, y + 1], -1) / GRID


def gui_screens(
    n: int,
    *,
    mix: Sequence[float | int] = (0.5, 0.25, 0.25),
    frame: str = "title",
    noise: float | int = 0.05,
    empty: float | int = 0.25,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> GuiScreens:
    """Draw n screens of 48 x 48 pixels.

    mix: how often each of `GUI_KINDS` comes. frame: a panel's colour is in a bar on top of it ("title": cells of the
    lower row do not show it) or all around it ("border"). noise: standard deviation. empty: share of empty cells among
    those that the instruction does not need. seed or generator: one of the two.
    Raises ValueError for n below 1, a mix that is no three shares, an unknown frame, noise below 0, empty outside 0..1,
    none or both of seed and generator.
    """
    if n < 1:
        raise ValueError(f"gui_screens: n is {n}; it must be at least 1")
    if len(mix) != len(GUI_KINDS) or min(mix) < 0 or not sum(mix) > 0:
        raise ValueError(f"gui_screens: mix is {tuple(mix)}; expected a share of each of {', '.join(GUI_KINDS)}")
    if frame not in ("title", "border"):
        raise ValueError(f"gui_screens: frame is {frame!r}; expected title or border")
    if not noise >= 0:
        raise ValueError(f"gui_screens: noise is {noise}; it must be 0 or more")
    if not 0 <= empty <= 1:
        raise ValueError(f"gui_screens: empty is {empty}; it must be within 0 and 1")
    if (seed is None) == (generator is None):
        raise ValueError("gui_screens: give either seed or generator")
    if generator is None:
        generator = torch.Generator().manual_seed(int(seed or 0))

    def choice(weights: Sequence[float | int]) -> Tensor:
        return torch.multinomial(torch.tensor(weights, dtype=torch.float), n, replacement=True, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (n, *shape), generator=generator)

    kind = choice(mix)
    named = torch.where(kind == 0, choice(NAMED), kind)
    shape, target = integers(len(ICONS)), integers(GRID * GRID)
    shapes = (shape[:, None] + 1 + integers(len(ICONS) - 1, GRID * GRID)) % len(ICONS)  # none is the one meant
    shapes[torch.rand(n, GRID * GRID, generator=generator) < empty] = -1
    rows = torch.arange(n)
    home = torch.tensor([panel_of(cell) for cell in range(GRID * GRID)])
    cells = torch.stack([(home == panel).nonzero()[:, 0] for panel in range(PANELS)])  # [4, 4] cells of each panel
    # A copy in one other panel at least, in each of the two more with even odds.
    other = (home[target][:, None] + 1 + torch.rand(n, PANELS - 1, generator=generator).argsort(1)) % PANELS
    copied = torch.cat([torch.ones(n, 1), torch.rand(n, PANELS - 2, generator=generator)], 1) > 0.5
    places = cells[other, integers(4, PANELS - 1)]
    for column in range(PANELS - 1):
        put = copied[:, column] & (kind > 0)
        shapes[rows[put], places[put, column]] = shape[put]
    # And one in the other row of the same panel.
    across = torch.where(target // GRID % 2 == 0, target + GRID, target - GRID)
    across = torch.where(integers(2) == 0, across, across ^ 1)
    nested = kind == 2
    shapes[rows[nested], across[nested]] = shape[nested]
    shapes[rows, target] = shape
    colours = integers(len(ICON_COLOURS), GRID * GRID)
    panels = torch.rand(n, PANELS, generator=generator).argsort(1)
    light = integers(2, PANELS)
    image = _drawn(shapes, colours, panels, light, frame)
    image = (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return GuiScreens(image, shapes, colours, panels, light, target, kind, named)


def _drawn(shapes: Tensor, colours: Tensor, panels: Tensor, light: Tensor, frame: str) -> Float[Tensor, "n 3 s s"]:
    """Rows of two greys, icons on them, the frames of the panels on top."""
    n = len(shapes)
    cells = torch.arange(GRID * GRID)
    home, half = cells // (2 * GRID) * 2 + cells % GRID // 2, cells // GRID % 2
    ground = torch.tensor(GREY)[(light[:, home] == half).long()]  # [n, 16]
    cover = torch.cat([_icons(), torch.zeros(1, CELL, CELL)])[shapes]  # an empty cell is the last, as -1
    paint = torch.tensor(list(ICON_COLOURS.values()))[colours]  # [n, 16, 3]
    plane = ground[:, :, None, None, None] * (1 - cover[:, :, None]) + paint[..., None, None] * cover[:, :, None]
    image = plane.view(n, GRID, GRID, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE, SIDE)
    tint = hsv_to_rgb(torch.tensor(list(PANEL_COLOURS.values()))[panels], 0.9, 0.9)  # [n, 4, 3]
    size = SIDE // 2
    for panel in range(PANELS):
        top, left = panel // 2 * size, panel % 2 * size
        part, colour = image[:, :, top : top + size, left : left + size], tint[:, panel, :, None, None]
        part[:, :, :2] = colour
        if frame == "border":
            part[:, :, -2:] = colour
            part[..., :2] = part[..., -2:] = colour
    return image


def _icons() -> Float[Tensor, "k c c"]:
    """The scenes' shapes, each in a cell of its own, a little below its middle."""
    ticks = (torch.arange(CELL) + 0.5) / CELL
    points = torch.stack([ticks.expand(CELL, CELL), ticks[:, None].expand(CELL, CELL)], -1)
    count = len(ICONS)
    center = torch.tensor([0.5, 0.56]).expand(1, 1, count, 2)
    framed = object_frame(points, center, torch.zeros(1, 1, count), torch.full((1, 1, count), 0.34))
    return coverage(torch.arange(count)[None, None], framed, torch.full((1, 1, count), 0.34 * CELL))[0, 0]
