"""Similarity of two networks' attention: divergence and CKA by layer, and divergence head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.analysis.similarity import Rows, Similarity


_WIDTH = 54
"""Characters in a line of full width, for names, which are wider than words."""


@style.drawn
def by_layer(found: Sequence[Similarity]) -> Figure:
    """Draw divergence by layer above, CKA below: all matchings of one comparison, or the optimal one of several."""
    names = [style.wrapped(one.b, 50) for one in found]
    legend = 0.26 if len(found) == 1 else style.height_of(names)
    title = _pair(found[0]) if len(found) == 1 else f"{found[0].a} and {len(found)} others"
    title = style.wrapped(f"{title}, {found[0].images} images", _WIDTH)
    along = style.wrapped(f"layer of {found[0].a}", 44)
    height = 2.7 + legend + 0.11 * (title.count("\n") + along.count("\n"))
    figure, (above, below) = style.panels(2, 1, height=height, sharex=True)
    if len(found) == 1:
        one = found[0]
        _line(above, one, one.matched("optimal"), "all tokens", style.BLUE, "o-")
        _line(above, one, one.matched("averaged"), "all tokens, heads averaged", style.SKY, "s--")
        if "class" in one.heads:
            _line(above, one, one.matched("optimal", "class"), "class token", style.VERMILLION, "^-")
            _line(above, one, one.matched("optimal", "patch"), "patches", style.GREEN, "v:")
        _line(below, one, one.cka["all"], "all tokens", style.BLUE, "o-")
        if "class" in one.cka:
            _line(below, one, one.cka["class"], "class token", style.VERMILLION, "^-")
    else:
        looks = zip(found, names, style.colours(len(found)), style.markers(len(found)), strict=True)
        for one, name, colour, marker in looks:
            _line(above, one, one.matched("optimal"), name, colour, f"{marker}-")
            _line(below, one, one.cka["all"], name, colour, f"{marker}-")
    above.set_ylabel("JSD of maps, bits\nheads one to one")
    below.set_ylabel("CKA of streams")
    for axes in (above, below):
        axes.set_ylim(0, max(1.0 if axes is below else 0.0, axes.get_ylim()[1] * 1.05))
        axes.grid(visible=False, axis="x")
    layers = [layer for layer, _ in found[0].layers]
    below.set_xticks(layers[:: -(-len(layers) // 14)])
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2 if len(found) == 1 else 1, frameon=False)
    below.set_xlabel(along)
    style.describe(figure, title)
    return figure


def _pair(one: Similarity) -> str:
    return f"{one.a}{' ' if len(one.a) + len(one.b) < 42 else chr(10)}and {one.b}"


def _line(axes: Axes, one: Similarity, values: NDArray[np.float64], label: str, colour: str, form: str) -> None:
    axes.plot([layer for layer, _ in one.layers], values, form, color=colour, label=label, ms=3)


_CELL = 0.3
"""Maximum height of a head's row, in inches."""


@style.drawn
def heads(one: Similarity, rows: Rows = "all") -> Figure:
    """Draw every head of A (rows) against each of B (columns), a panel for each layer; dots: optimal matching."""
    matrices = one.heads[rows]
    count, down, across = matrices.shape
    columns = min(4, count)
    lines = -(-count // columns)
    panel = (style.COLUMN - 0.75) / columns
    tall = max(min(panel * down / across, _CELL * down), 0.4)  # don't enlarge a few heads in a few layers
    figure, panels = style.panels(lines, columns, height=max(lines * (tall + 0.2), 1.3) + 0.6)
    top = max(float(matrices.max()), 1e-6)
    image = None
    for i, axes in enumerate(panels):
        axes.set_visible(i < count)
        if i >= count:
            continue
        image = axes.imshow(matrices[i], vmin=0, vmax=top, cmap="viridis_r", aspect="auto")
        mine, theirs = one.assignments(rows)[i]
        size = 60 * min(panel / across, tall / down)
        axes.scatter(theirs, mine, s=(size / 3.5) ** 2, color="white", edgecolors=style.INK, linewidths=0.5)
        layer_a, layer_b = one.layers[i]
        axes.set_title(f"layer {layer_a}" if layer_a == layer_b else f"layer {layer_a} : {layer_b}", pad=2)
        axes.grid(visible=False)
        axes.set_xticks(np.arange(0, across, max(1, across // 4)))
        axes.set_yticks(np.arange(0, down, max(1, down // 4)))
        axes.tick_params(length=0, labelbottom=i + columns >= count, labelleft=i % columns == 0)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, aspect=30)
    bar.set_label("JSD, bits", fontsize=7)
    bar.outline.set_visible(False)
    below = f"down: heads of {one.a}\nacross: of {one.b}; dots: matched one to one"
    below = "\n".join(style.wrapped(line, _WIDTH) for line in below.splitlines())
    title = style.wrapped(f"{_pair(one)}, {one.images} images", _WIDTH)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.1 * (title.count("\n") + below.count("\n") - 1))
    style.describe(figure, title, below)
    return figure
