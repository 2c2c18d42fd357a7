"""Attention maps of one image and one query: subjects (and heads) in rows, layers in columns, the rollout last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atdiag.analysis.maps import Shown

_LABEL, _GAP = 0.75, 0.06


@style.drawn
def attention_maps(found: Sequence[Shown], image: int = 0, query: int = 0) -> Figure:
    """Draw attention over the image, each map scaled from 0 to its own maximum, which is written below it."""
    rows = [(one, head) for one in found for head in range(len(one.heads))]
    across = max(len(one.layers) for one in found)
    roll = any(one.rollout is not None for one in found)
    columns = 1 + across + roll
    wide = columns > 5
    width = 2 * style.COLUMN + 0.25 if wide else style.COLUMN
    panel = min((width - _LABEL) / columns - _GAP, 1.1)
    alone = len(found) == 1
    title = _title(found, image, query, 140 if wide else 64)
    names = [_name(one, head, alone) for one, head in rows]
    height = sum(max(panel, 0.1 * name.count("\n") + 0.1) + 0.13 for name in names) + 0.43 + 0.12 * len(title)
    figure, panels = style.panels(len(rows), columns, height, width)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01)  # type: ignore[union-attr, call-arg]
    same = len({one.layers for one in found}) == 1
    for i, (one, head) in enumerate(rows):
        line = panels[i * columns : (i + 1) * columns]
        for axes in line:
            _bare(axes)
        _picture(line[0], one, image)
        _mark(line[0], one, query)
        line[0].set_ylabel(names[i], rotation=0, ha="right", va="center", labelpad=3)
        for j, layer in enumerate(one.layers):
            _overlay(line[1 + j], one, image, query, one.attention[image, j, query, head])
            if i == 0 or not same:
                line[1 + j].set_title(f"layer {layer}", pad=2)
        for axes in line[1 + len(one.layers) : 1 + across]:
            axes.set_visible(False)
        if roll:
            line[-1].set_visible(one.rollout is not None and head == 0)
            if one.rollout is not None and head == 0:
                _overlay(line[-1], one, image, query, one.rollout[image, query])
                if i == 0 or not same:
                    line[-1].set_title("rollout", pad=2)
    style.describe(figure, "\n".join(title), "each map from 0 (dark) to its largest weight (written below)")
    return figure


def _title(found: Sequence[Shown], image: int, query: int, most: int) -> list[str]:
    """Return the title (image, subjects, heads) as one line, or as two if too long."""
    first = found[0]
    words = {"cls": "the class token", "centre": "the patch in the centre"}
    asked = first.queries[query]
    what = [f"attention of {words.get(asked, f'the patch at {asked}')}"]
    if len(first.heads) == 1:
        what.append("mean over heads" if first.heads[0] == "mean" else f"head {first.heads[0]}")
    what += [first.label] if len(found) == 1 else []
    parts = [first.names[image], ", ".join(what)]
    whole = ": ".join(parts)
    # Names are wider than words: of capitals and digits, as ILSVRC2012_val_00004650.JPEG.
    if len(whole) <= most:
        return [whole]
    return [*style.wrapped(parts[0], most * 3 // 4).splitlines(), *style.wrapped(parts[1], most).splitlines()]


def _name(one: Shown, head: int, alone: bool) -> str:
    """Return a row's label in short lines: its subject, if there are several, and its head."""
    parts = [] if alone else [style.wrapped(one.label, 13)]
    return "\n".join([*parts, *([f"head {one.heads[head]}"] if len(one.heads) > 1 else [])])


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _canvas(one: Shown, image: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the image as the network sees it, [S, S, 3]."""
    pixels = one.pixels[image]
    return (np.repeat(pixels, 3, 0) if len(pixels) == 1 else pixels).transpose(1, 2, 0)


def _picture(axes: Axes, one: Shown, image: int) -> None:
    axes.imshow(_canvas(one, image), interpolation="nearest", vmin=0, vmax=1)


def _overlay(axes: Axes, one: Shown, image: int, query: int, weights: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Draw the image in grey under its map in colour, bright where attention is high."""
    from matplotlib import colormaps

    largest = float(weights.max())
    side = one.network.patch_size
    share = np.kron(weights / max(largest, 1e-12), np.ones((side, side)))
    grey = _canvas(one, image).mean(-1)
    colour = colormaps["inferno"](0.95 * share)[..., :3]
    axes.imshow(0.35 * grey[..., None] + 0.65 * colour, interpolation="nearest", vmin=0, vmax=1)
    axes.set_xlabel(
        f"{largest:.3f}" if largest < 0.1 else f"{largest:.2f}", fontsize=5.5, labelpad=1.5, color=style.GREY
    )
    _mark(axes, one, query)


def _mark(axes: Axes, one: Shown, query: int) -> None:
    """Draw a square around the query's patch."""
    from matplotlib.patches import Rectangle

    if (point := one.point(query)) is None:
        return
    side = one.network.patch_size
    corner = point[0] - side / 2, point[1] - side / 2
    for colour, width in (("white", 1.4), (style.INK, 0.6)):
        axes.add_patch(Rectangle(corner, side, side, fill=False, ec=colour, lw=width, clip_on=False))
