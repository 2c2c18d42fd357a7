"""Accuracy of probes over depth, all subjects in one plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROBES = {"linear": "linear probe", "knn": "nearest neighbours", "centroid": "nearest class mean"}
_TOKENS = {"class": "class token", "patch": "mean patch", "both": "class token and mean patch"}


@style.drawn
def depth(frame: pd.DataFrame) -> Figure:
    """Draw the linear probe on all features (class token and mean patch) above, the early exit below.

    frame: from ``atdiag.study.depth.frame``. Bands are intervals; a bar at the right edge is the network itself.
    """
    exits = frame[frame.probe == "head"]
    rows = 2 if len(exits) else 1
    subjects = list(frame.subject.unique())
    legend = style.height_of([style.wrapped(name, 50) for name in subjects])
    figure, panels = style.panels(rows, 1, 0.9 + 1.35 * rows + legend, sharex=True)
    linear = frame[frame.probe == "linear"]
    best = linear[(linear.tokens == "both") | ~linear.subject.isin(linear[linear.tokens == "both"].subject)]
    without = [name for name in subjects if name not in set(linear[linear.tokens == "both"].subject)]
    _lines(panels[0], best, subjects)
    panels[0].set_title("linear probe on class token and mean patch", loc="left", pad=3)
    if rows == 2:
        _lines(panels[1], exits, subjects)
        panels[1].set_title("early exit: the trained head after each layer", loc="left", pad=3)
        _ends(panels[1], frame[frame.probe == "itself"], subjects)
    notes = [style.wrapped(f"{', '.join(without)}: mean patch alone", 62)] if without else []
    notes += ["bars at the right of the early exit: the networks themselves"] if rows == 2 else []
    for axes in panels[:rows]:
        axes.set_ylabel("top-1, %")
    panels[rows - 1].set_xlabel("layer")
    _finish(
        figure,
        panels[0],
        frame,
        "\n".join(notes),
        columns=1,
    )
    return figure


@style.drawn
def grid(frame: pd.DataFrame) -> Figure:
    """Draw every probe (rows) on every kind of features (columns)."""
    kinds = [tokens for tokens in _TOKENS if (frame.tokens == tokens).any()]
    subjects = list(frame.subject.unique())
    width = style.COLUMN if len(kinds) == 1 else style.PAGE
    across = 3 if len(kinds) > 1 else 1
    legend = style.height_of([style.wrapped(name, 50) for name in subjects], across)
    figure, panels = style.panels(
        len(_PROBES), len(kinds), 0.75 + 1.35 * len(_PROBES) + legend, width, sharex=True, sharey=True
    )
    for i, (probe, name) in enumerate(_PROBES.items()):
        for j, tokens in enumerate(kinds):
            axes = panels[i * len(kinds) + j]
            _lines(axes, frame[(frame.probe == probe) & (frame.tokens == tokens)], subjects)
            if i == 0:
                axes.set_title(_TOKENS[tokens], pad=3)
            if j == 0:
                axes.set_ylabel(f"{name}\ntop-1, %")
    for axes in panels[-len(kinds) :]:
        axes.set_xlabel("layer")
    _finish(figure, panels[kinds.index("patch")], frame, "", columns=across)
    return figure


def _lines(axes: Axes, frame: pd.DataFrame, subjects: list[str]) -> None:
    for name, colour, marker in zip(subjects, style.colours(len(subjects)), style.markers(len(subjects)), strict=True):
        one = frame[frame.subject == name].sort_values("layer")
        if not len(one):
            continue
        axes.fill_between(one.layer, one.ci_low, one.ci_high, color=colour, alpha=0.15, lw=0)
        axes.plot(
            one.layer, one.top1, color=colour, marker=marker, ms=3, label=style.wrapped(name, 50), mec="white", mew=0.3
        )
    axes.grid(visible=False, axis="x")


def _ends(axes: Axes, frame: pd.DataFrame, subjects: list[str]) -> None:
    """Draw short bars for each network's own accuracy, right of the axes so that they hide no line."""
    for name, colour in zip(subjects, style.colours(len(subjects)), strict=True):
        for level in frame[frame.subject == name].top1:
            axes.plot([1.005, 1.035], [level, level], transform=axes.get_yaxis_transform(), color=colour, clip_on=False)


def _finish(figure: Figure, axes: Axes, frame: pd.DataFrame, note: str, columns: int) -> None:
    """Add ticks, the legend of the lines in some axes, a title that says what was measured, and a note below."""
    layers = sorted(layer for layer in frame.layer.unique() if layer >= 0)
    axes.set_xticks(layers[:: -(-len(layers) // 14)])
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)
    seeds = int(frame.seeds.max())
    first = frame.iloc[0]
    title = f"{first.images} test images, {first.train} to fit" + (f", {seeds} seeds" if seeds > 1 else "")
    covers = "seeds and images" if seeds > 1 else "images"
    if frame.seeds.nunique() > 1:
        covers += " (of one seed: over images)"
    style.describe(figure, "\n".join(filter(None, (title, f"95 % intervals over {covers}", note))))
