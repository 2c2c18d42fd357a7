"""Effect of patching, place by place: a map of block by head or position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.hooks.patches import Patched

_UNITS = {"margin": "margin", "top1": "top-1, points", "loss": "loss, nats"}
_AXES = {"head": "head", "position": "token", "layer": ""}


@style.drawn
def effects(found: Patched) -> Figure:
    """Draw the change of the measure for every patch: red where it rises, blue where it falls, white for none.

    By layer alone, as a line.
    """
    title = style.wrapped(f"{found.what} of {found.b} put into {found.a}, {found.images} images", 54)
    if found.by == "layer":
        return _line(found, title)
    change = found.change
    rows, columns = change.shape
    figure, axes = style.canvas(height=0.75 + max(1.0, min(0.16 * rows, 3.2)) + 0.11 * title.count("\n"))
    top = float(np.abs(change).max()) or 1.0
    image = axes.imshow(change, vmin=-top, vmax=top, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(0, rows, -(-rows // 12)), [str(found.layers[i]) for i in range(0, rows, -(-rows // 12))])
    axes.set_xticks(range(0, columns, -(-columns // 12)))
    axes.set_ylabel("block")
    axes.set_xlabel(_AXES[found.by] + (" (0: class token)" if found.by == "position" and found.class_token else ""))
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=14)
    bar.set_label(f"change of {_UNITS[found.measure]}")
    bar.outline.set_visible(False)
    style.describe(figure, title)
    return figure


def _line(found: Patched, title: str) -> Figure:
    frame = found.frame()
    figure, axes = style.canvas(height=2.0)
    axes.plot(frame.layer, frame.change, "o-", color=style.BLUE, ms=3)
    axes.vlines(frame.layer, frame.ci_low, frame.ci_high, color=style.BLUE, lw=0.8)
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_xticks(found.layers[:: -(-len(found.layers) // 14)])
    axes.set_xlabel("block")
    axes.set_ylabel(f"change of\n{_UNITS[found.measure]} [95 %]")
    axes.grid(visible=False, axis="x")
    style.describe(figure, title)
    return figure
