"""Attention statistics by layer: a panel for each statistic, subjects side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from atdiag.analysis.statistics import Stats

_NAMES = {
    "entropy": "entropy, bits",
    "distance": "distance, pixels",
    "rank": "effective rank, dimensions",
    "redundancy": "divergence of heads, bits",
    "sink": "largest column mean, share",
    "class_share": "share on class token",
    "register_share": "share on registers",
    "high_norm": "share of high-norm tokens",
    "norm": "median norm of patches, no unit",
}


@style.drawn
def attention_stats(found: Sequence[Stats]) -> Figure:
    """Draw the mean over heads as lines, and each head as a dot."""
    values = {name: [_of(one, name) for one in found] for name in _NAMES}
    names = [name for name, of in values.items() if not all(np.isnan(one).all() for one in of)]
    columns = 3
    rows = -(-len(names) // columns)
    width = 2 * style.COLUMN + 0.25
    below = style.height_of([style.wrapped(one.label, 44) for one in found], 3)
    figure, panels = style.panels(rows, columns, 0.5 + 1.4 * rows + below, width)
    subjects = zip(found, style.colours(len(found)), style.markers(len(found)), strict=True)
    # A copy-student's attention equals its teacher's: the line below is wider, so that both are visible.
    widths = np.linspace(1.2 + 0.45 * (len(found) - 1), 1.2, len(found)).clip(max=3)
    drawn = [(place, *one) for place, one in enumerate(subjects)]
    for axes, name in zip(panels, names, strict=False):
        for place, one, colour, marker in drawn:
            value = values[name][place]
            if np.isnan(value).all():
                continue
            mean = value.mean(1)
            if value.shape[1] > 1:
                beside = 0.14 * (place - (len(found) - 1) / 2)  # offset dots of different subjects
                layers = np.repeat(np.array(one.layers) + beside, value.shape[1])
                axes.plot(layers, value.ravel(), ".", color=colour, ms=2.5, alpha=0.45, mew=0)
            axes.plot(
                one.layers,
                mean,
                color=colour,
                marker=marker,
                lw=widths[place],
                ms=3 + widths[place] - widths[-1],
                mec="white",
                mew=0.3,
                label=style.wrapped(one.label, 44),
            )
        axes.set_title(_NAMES[name], pad=3)
        axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        layers_all = sorted({layer for one in found for layer in one.layers})
        axes.set_xticks(layers_all[:: -(-len(layers_all) // 8)])
    for i, axes in enumerate(panels):
        axes.set_visible(i < len(names))
        if i < len(names) and i + columns >= len(names):
            axes.set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False)
    told = f"{found[0].images} images (effective rank: {found[0].rank_images}); lines: mean over heads, dots: heads"
    style.describe(figure, told)
    return figure


def _of(one: Stats, name: str) -> NDArray[np.float64]:
    """Return a statistic's values [L, H]; [L, 1] for one of the whole layer."""
    return one.heads[name] if name in one.heads else one.layers_only[name][:, None]
