"""Shared style of all figures: two-column paper widths, colour-blind safe, legible in print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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

_SETTINGS = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "figure.titlesize": 7,
    "figure.labelsize": 7,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.2,
    "xtick.major.pad": 1,
    "ytick.major.pad": 1,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.dpi": 300,
}


def colours(count: int) -> list[str]:
    """Return this many line colours; beyond the palette, shades of one colour, in order."""
    if count <= len(CYCLE):
        return list(CYCLE[:count])
    import seaborn as sns

    return [str(colour) for colour in sns.color_palette("crest", count).as_hex()]


def markers(count: int) -> list[str]:
    """Return this many markers, so that lines can be told apart without colour."""
    return ["os^vDPXd*h"[i % 10] for i in range(count)]


def canvas(height: float, width: float = COLUMN) -> tuple[Figure, Axes]:
    """Create an empty figure in the shared style, drawn without a display."""
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sns.set_theme(context="paper", style="whitegrid", rc=_SETTINGS)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sns.despine(ax=axes, left=True)
    return figure, axes


def panels(rows: int, columns: int, height: float, width: float = COLUMN, **options: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure with several axes, row by row. options: for matplotlib's ``subplots``."""
    import seaborn as sns

    figure, first = canvas(height, width)
    first.remove()
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    every = [axes for row in grid for axes in row]
    for axes in every:
        sns.despine(ax=axes, left=True)
    return figure, every


def describe(figure: Figure, title: str, below: str = "") -> None:
    """Add a title, and a line below, over the figure's full width, since wide labels make the axes narrow."""
    figure.suptitle(title, x=0.01, ha="left")
    if below:
        figure.supxlabel(below, x=0.99, ha="right")


def finish(figure: Figure, title: str, keys: Sequence[Line2D], note: str = "") -> None:
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


def short(name: str, most: int = 26) -> str:
    """Shorten a name that is too long by leaving out its middle.

    >>> short("clip_b (mini)"), short("vit_so400m_patch14_reg4_siglip_gap_896", 20)
    ('clip_b (mini)', 'vit_so400m...gap_896')
    """
    left = (most - 2) // 2
    return name if len(name) <= most else f"{name[: left + 1]}...{name[-(most - left - 4) :]}"
