"""Shared style of all figures: two-column paper widths, colour-blind safe, legible in print."""

from __future__ import annotations

import contextlib
import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from atdiag.reports import drawing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

P = ParamSpec("P")

COLUMN = 3.35
"""Width of one column of a two-column paper, in inches. A figure is saved at exactly its size."""

PAGE = 2 * COLUMN + 0.25
"""Width of both columns and the gap between them, in inches."""

# Okabe and Ito's palette, safe for the common forms of colour blindness.
INK, GREY = "#222222", "#6E6E6E"
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK, GREY)
"""Colours of lines, in order."""

_SETTINGS: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 7,
    "figure.labelsize": 7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#CCCCCC",
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "lines.solid_capstyle": "round",
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.major.size": 4.8,
    "ytick.major.size": 4.8,
    "xtick.major.pad": 1,
    "ytick.major.pad": 1,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.dpi": 300,
}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Apply the house style inside the context, on matplotlib's :func:`~atdiag.reports.drawing.defaults`."""
    with drawing.defaults():
        sns = _seaborn()
        matplotlib.rcParams.update({**sns.plotting_context("paper"), **sns.axes_style("whitegrid"), **_SETTINGS})
        yield


@functools.cache
def _seaborn() -> Any:
    """Import seaborn despite any backend named in the environment: it imports pyplot, which would load that backend."""
    with drawing.defaults():
        import seaborn
    return seaborn


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorate a function that makes a figure: run it inside :func:`settings`."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with settings():
            return function(*args, **kwargs)

    return inside


class HouseFigure(Figure):
    """A figure that is also drawn and saved with :func:`settings`. Its Agg canvas needs neither display nor pyplot."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        """Draw the figure."""
        with settings():
            super().draw(renderer)

    def savefig(self, *args: Any, **options: Any) -> None:
        """Write the figure to a file."""
        with settings():
            super().savefig(*args, **options)


def colours(count: int) -> list[str]:
    """Return this many line colours; beyond the palette, shades of one colour, in order."""
    if count <= len(CYCLE):
        return list(CYCLE[:count])
    return [str(colour) for colour in _seaborn().color_palette("crest", count).as_hex()]


def markers(count: int) -> list[str]:
    """Return this many markers, so that lines can be told apart without colour."""
    return ["os^vDPXd*h"[i % 10] for i in range(count)]


def canvas(height: float, width: float = COLUMN) -> tuple[Figure, Axes]:
    """Make an empty figure in the house style, drawn without a display."""
    with settings():
        figure = HouseFigure(width, height)
        return figure, figure.subplots()


def panels(rows: int, columns: int, height: float, width: float = COLUMN, **options: Any) -> tuple[Figure, list[Axes]]:
    """Make a :func:`canvas` with several axes, row by row. options: those of matplotlib's ``subplots``."""
    with settings():
        figure = HouseFigure(width, height)
        grid = figure.subplots(rows, columns, squeeze=False, **options)
        return figure, [axes for row in grid for axes in row]


def describe(figure: Figure, title: str, below: str = "") -> None:
    """Add a title, and a line below, over the figure's full width, since wide labels make the axes narrow."""
    figure.suptitle(title, x=0.01, ha="left")
    if below:
        figure.supxlabel(below, x=0.99, ha="right")


def finish(figure: Figure, title: str, keys: Sequence[Artist], note: str = "") -> None:
    """Add a title, and a legend with a note below; the figure grows to fit them, so that the axes keep their size."""
    width, height = figure.get_size_inches()
    note = "\n".join(textwrap.fill(line, int(17 * width)) for line in note.splitlines())
    longest = max((len(str(key.get_label())) for key in keys), default=0)
    columns = max(1, min(len(keys), int(width / (0.4 + 0.052 * longest)), 6))
    lines = -(-len(keys) // columns) + (note.count("\n") + 1 if note else 0)
    figure.set_size_inches(width, height + 0.15 + 0.13 * lines + 0.14 * (title.count("\n") + 1))
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(
        handles=list(keys),
        title=note or None,
        title_fontsize=6.5,
        alignment="left",
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
        labelspacing=0.3,
        borderpad=0.2,
    )


def wrapped(name: str, most: int = 40) -> str:
    """Break a name into lines of at most ``most`` characters, after spaces and punctuation, else anywhere; never cut.

    >>> wrapped("vit_so400m_patch14_reg4_siglip_gap_896", 20).splitlines()
    ['vit_so400m_patch14_', 'reg4_siglip_gap_896']
    """
    if "\n" in name:
        return "\n".join(wrapped(line, most) for line in name.splitlines())
    lines = [""]
    for part in re.findall(r"[^ _./@:+,-]*[ _./@:+,-]*", name):
        if len((lines[-1] + part).rstrip()) > most and lines[-1]:
            lines.append("")
        lines[-1] += part
        while len(lines[-1].rstrip()) > most:
            lines[-1:] = [lines[-1][:most], lines[-1][most:]]
    return "\n".join(line.rstrip() for line in lines)


def height_of(labels: Iterable[str], columns: int = 1) -> float:
    """Return the height of a legend of such labels, in inches."""
    heights = [0.04 + 0.1 * (label.count("\n") + 1) for label in labels]
    return sum(max(heights[i : i + columns]) for i in range(0, len(heights), columns))
