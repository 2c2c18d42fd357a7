"""Time and memory of a step of each method, as multiples of those of plain training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.stats.paired import Median


@style.drawn
def cost(title: str, times: Mapping[str, Median], memory: Mapping[str, float], baseline: str) -> Figure:
    """Draw a bar for each method's time, with its interval, and one for its memory; a line at the baseline's.

    times, memory: by method; memory may be empty.
    """
    from matplotlib.patches import Patch

    figure, axes = style.canvas(0.4 + 0.42 * len(times))
    thick = 0.36 if memory else 0.6
    for y, (name, one) in enumerate(times.items()):
        place = y - thick / 2 if memory else float(y)
        axes.barh(place, one.value, thick, color=style.BLUE, zorder=2)
        axes.plot([one.low, one.high], [place, place], color=style.INK, lw=1.0, solid_capstyle="butt", zorder=3)
        told = [(place, max(one.value, one.high), f"{one.value:.2f}")]
        if name in memory:
            axes.barh(y + thick / 2, memory[name], thick, color=style.SKY, zorder=2)
            told.append((y + thick / 2, memory[name], f"{memory[name]:.2f}"))
        for at, end, text in told:
            axes.annotate(text, (end, at), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.axvline(1, color=style.INK, lw=0.8, zorder=4)
    axes.set_yticks(range(len(times)), list(times))
    axes.set_ylim(len(times) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(*(one.high for one in times.values()), *memory.values(), 1.0))
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"a step's cost as a multiple of {baseline}'s")
    keys = [Patch(color=style.BLUE, label="time")] + ([Patch(color=style.SKY, label="memory")] if memory else [])
    repeats = next(iter(times.values())).repeats
    note = f"time: median of {repeats} rounds, with its 95 % interval over rounds on this machine"
    style.finish(figure, title, keys, note)
    return figure
