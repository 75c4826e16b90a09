"""Figures in one style: head maps, and the lines and bars of the papers' reproductions. Light, colour-blind safe.

matplotlib is imported when a figure is drawn; the extra ``headwise[plots]`` brings it.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from headwise._files import atomic_path
from headwise.attend.head_map import HeadMap
from headwise.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "bars", "circuit_graph", "figure", "head_matrix", "lines", "plot_head_map", "save_figure"]

Numbers = Sequence[float | int]  # both named: the type checks of the tests do not take 1 for a float

# Okabe and Ito's palette, told apart under every common kind of colour blindness; its yellow is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RAMP = ("#f0f1ec", "#7fb3bd", "#12315c")  # as in the HTML report
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": "#1b1f24",
    "axes.labelcolor": "#1b1f24",
    "xtick.color": "#5a626c",
    "ytick.color": "#5a626c",
    "axes.edgecolor": "#a9aeb4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e8e6e0",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise InputError("plots: matplotlib is not installed; install headwise[plots]") from None
    with matplotlib.rc_context(STYLE):
        yield


@contextmanager
def figure(
    path: str | os.PathLike[str], panels: int = 1, *, width: float = 4.6, height: float = 3.2
) -> Iterator[list["Axes"]]:
    """Axes side by side; the PNG is written when the block ends well. width and height of one panel, in inches.

    >>> with figure("losses.png", 2) as (left, right):  # doctest: +SKIP
    ...     lines(left, [1, 2, 3], {"sink": [0.2, 0.5, 0.9]}, x="step", y="mass on the first token")
    """
    with _style():
        from matplotlib.figure import Figure

        fig = Figure(figsize=(width * panels, height))
        yield [fig.add_subplot(1, panels, 1 + i) for i in range(panels)]
        save_figure(fig, path)


def save_figure(fig: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG: 160 dots an inch, atomically, the same bytes for the same figure."""
    with atomic_path(path) as temporary:
        fig.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


def lines(
    axes: "Axes",
    x_values: Numbers,
    series: Mapping[str, Numbers],
    *,
    spread: Mapping[str, Numbers] | None = None,
    x: str = "",
    y: str = "",
    title: str = "",
) -> None:
    """Draw named lines, told apart by colour and marker. spread: half the height of a band around each."""
    for i, (name, values) in enumerate(series.items()):
        if len(values) != len(x_values):
            raise ValueError(f"lines: {name!r} has {len(values)} values for {len(x_values)} places; they must match")
        shade, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x_values, values, color=shade, marker=marker, label=name)
        if spread is not None and name in spread:
            low = [value - half for value, half in zip(values, spread[name], strict=True)]
            high = [value + half for value, half in zip(values, spread[name], strict=True)]
            axes.fill_between(x_values, low, high, color=shade, alpha=0.15, linewidth=0)
    _finish(axes, x, y, title, legend=len(series) > 1)


def bars(
    axes: "Axes",
    groups: Sequence[str],
    series: Mapping[str, Numbers],
    *,
    error: Mapping[str, Numbers] | None = None,
    x: str = "",
    y: str = "",
    title: str = "",
) -> None:
    """Draw bars in groups, one colour per series. error: half the length of an error bar."""
    width = 0.8 / max(1, len(series))
    for i, (name, values) in enumerate(series.items()):
        if len(values) != len(groups):
            raise ValueError(f"bars: {name!r} has {len(values)} values for {len(groups)} groups; they must match")
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(
            places,
            values,
            width * 0.92,
            color=COLOURS[i % len(COLOURS)],
            label=name,
            yerr=None if error is None else error.get(name),
            error_kw={"ecolor": "#1b1f24", "elinewidth": 1, "capsize": 2},
        )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(visible=False, axis="x")
    _finish(axes, x, y, title, legend=False)
    if len(series) > 1:  # inside, it would lie on bars sooner or later
        below = (0.18 if x else 0.1) + 0.07 * max((group.count("\n") for group in groups), default=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -below), ncols=min(3, len(series)), fontsize=8)


def head_matrix(
    axes: "Axes",
    scores: Any,
    *,
    marked: Sequence[tuple[int, int]] = (),
    limit: float | None = None,
    title: str = "",
    label: str = "",
) -> None:
    """Draw signed scores `[l, h]` of heads: layers down, heads across, 0 white, grey where no score is.

    scores: nested lists, an array or a tensor. marked: (layer, head) pairs that get a frame. limit: the score at which
    colours end on both sides; None means the largest. label: what the colours measure.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    rows = [[float(value) for value in row] for row in scores]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"head_matrix: {len(rows)} layers of {sorted({len(row) for row in rows})} heads; give [l, h]")
    known = [abs(value) for row in rows for value in row if not math.isnan(value)]
    end = limit if limit is not None else max(known, default=0.0) or 1.0
    colours = LinearSegmentedColormap.from_list("signed", (COLOURS[1], "#ffffff", COLOURS[0])).with_extremes(
        bad="#c9c9c9"
    )
    image = axes.imshow(rows, cmap=colours, vmin=-end, vmax=end, aspect="auto", interpolation="nearest")
    for layer, head in marked:
        axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="#1b1f24", linewidth=1.6))
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    if axes.figure is not None:
        axes.figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03, label=label)
    _finish(axes, "head", "layer", title, legend=False)


def circuit_graph(
    axes: "Axes", stages: Mapping[str, Sequence[Any]], *, shared: Sequence[Any] = (), title: str = ""
) -> None:
    """Draw the stages of a circuit, the output on top: one box for each stage with its nodes, arrows upwards.

    stages: name -> nodes, from the output back to the input. shared: nodes that are drawn in a second colour.
    """
    if not stages:
        raise ValueError("circuit_graph: there are no stages; give at least one")
    known = {str(node) for node in shared}
    height = len(stages)
    for depth, (name, nodes) in enumerate(stages.items()):
        y = height - 1 - depth
        axes.text(0.0, y, name, ha="left", va="center", fontweight="bold", parse_math=False)
        for i, node in enumerate(nodes):
            colour = COLOURS[1] if str(node) in known else COLOURS[0]
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4}
            axes.text(0.48 + 0.16 * i, y, str(node), ha="center", va="center", color=colour, bbox=box)
        if depth:
            axes.annotate("", (0.48, y + 0.72), (0.48, y + 0.28), arrowprops={"arrowstyle": "->", "color": "#5a626c"})
    widest = max(len(nodes) for nodes in stages.values())
    axes.set_xlim(-0.02, max(1.0, 0.6 + 0.16 * widest))
    axes.set_ylim(-0.6, height - 0.4)
    axes.axis("off")
    axes.set_title(title)


def plot_head_map(
    scores: HeadMap, path: str | os.PathLike[str], *, probes: Sequence[str] | None = None, tower: str = ""
) -> None:
    """Write the maps of several probes as one PNG (`heads.png`): layers down, heads across, grey where no score is."""
    names = [name for name in (scores.probes if probes is None else probes) if _known(scores, name, tower)]
    if not names:
        raise ValueError(f"plot_head_map: no head of {tower or 'the main tower'} has a score; nothing to draw")
    tables = {name: scores.tensor(name, tower).numpy() for name in names}
    layers, heads = next(iter(tables.values())).shape
    cell = 0.22 if max(layers, heads) <= 16 else 0.1
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with _style():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        ramp = LinearSegmentedColormap.from_list("headwise", RAMP).with_extremes(bad="#c9c9c9")
        fig = Figure(figsize=(columns * max(2.6, heads * cell + 1.2), rows * max(1.6, layers * cell + 0.9)))
        if scores.model:
            fig.suptitle(scores.model, x=0.01, ha="left", fontweight="bold", parse_math=False)
        for i, (name, table) in enumerate(tables.items()):
            axes = fig.add_subplot(rows, columns, 1 + i)
            low = min(0.0, float(table[table == table].min()))
            image = axes.imshow(table, cmap=ramp, vmin=low, aspect="auto", interpolation="nearest")
            axes.set_title(name, parse_math=False)
            axes.grid(visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_xlabel("head")
            if i % columns == 0:
                axes.set_ylabel("layer")
            fig.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
        save_figure(fig, path)


def _known(scores: HeadMap, probe: str, tower: str) -> bool:
    return bool(scores.ranked(probe, tower=tower))


def _finish(axes: "Axes", x: str, y: str, title: str, *, legend: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    if legend:
        axes.legend()
