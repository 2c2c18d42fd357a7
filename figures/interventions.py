"""Effect of replacing parts of a network's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from figures import marks, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.analysis.interventions import Outcome


@style.drawn
def residual(found: Sequence[Outcome]) -> Figure:
    """Draw the change of the residual stream by block; at the last block if layers were replaced singly."""
    groups = _by_name(found)
    names = {name: style.wrapped(name, 50) for name in groups}
    figure, axes = style.canvas(height=2.0 + style.height_of(names.values()))
    for (name, outcomes), colour, marker in _lines(groups):
        if _one_at_a_time(found):
            places, values = [one.layers[0] for one in outcomes], [float(one.residual[-1]) for one in outcomes]
        else:
            places, values = [*range(len(outcomes[0].residual))], outcomes[0].residual.tolist()
        axes.plot(places, values, f"{marker}-", color=colour, ms=3, label=names[name])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("change of the residual\nstream, share of its norm")
    axes.grid(visible=False, axis="x")
    depth = len(found[0].residual)
    axes.set_xticks(range(0, depth, -(-depth // 14)))
    one_layer = "the one layer that was replaced (stream after the last)"
    axes.set_xlabel(one_layer if _one_at_a_time(found) else "block whose output is compared")
    figure.legend(loc="outside lower left", ncols=1, frameon=False)
    style.describe(figure, _title(found))
    return figure


@style.drawn
def accuracy(found: Sequence[Outcome]) -> Figure:
    """Draw the change of accuracy with its interval, by replacement, or by layer if layers were replaced singly."""
    groups = _by_name(found)
    if _one_at_a_time(found):
        return _by_layer(found, groups)
    names = [style.wrapped(one.replaced, 32) for one in found]
    figure, axes = style.canvas(height=0.8 + max(0.2 * len(found), style.height_of(names)))
    for y, one in enumerate(found):
        assert one.change is not None
        value, low, high = one.change
        axes.plot([low, high], [y, y], color=style.BLUE, solid_capstyle="butt")
        marks.point(axes, value, y, style.BLUE, "o", _clear(one), size=4.5)
    axes.axvline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.set_xlim(_at_least(axes.get_xlim()))
    axes.locator_params(axis="x", nbins=5)
    axes.grid(visible=False, axis="y")
    style.describe(figure, _title(found), _below(found))
    return figure


def _by_layer(found: Sequence[Outcome], groups: dict[str, list[Outcome]]) -> Figure:
    names = {name: style.wrapped(name, 50) for name in groups}
    figure, axes = style.canvas(height=2.1 + style.height_of(names.values()))
    keys = []
    for i, ((name, outcomes), colour, marker) in enumerate(_lines(groups)):
        offset = 0.08 * (i - (len(groups) - 1) / 2)
        layers = [one.layers[0] + offset for one in outcomes]
        values = [one.change for one in outcomes if one.change is not None]
        points = [value for value, _, _ in values]
        axes.plot(layers, points, color=colour)
        for x, y, one in zip(layers, points, outcomes, strict=True):
            marks.point(axes, x, y, colour, marker, _clear(one), size=3)
        keys.append(marks.key((colour, marker), names[name]))
        axes.vlines(layers, [low for _, low, _ in values], [high for _, _, high in values], color=colour, lw=0.8)
    axes.axhline(0, color=style.INK, lw=0.8, zorder=1)
    axes.set_ylim(_at_least(axes.get_ylim()))
    layers = sorted({one.layers[0] for one in found})
    axes.set_xticks(layers[:: -(-len(layers) // 14)])
    axes.set_ylabel("change of top-1, points")
    axes.grid(visible=False, axis="x")
    figure.legend(handles=keys, loc="outside lower left", ncols=1, frameon=False)
    axes.set_xlabel("the one layer that was replaced")
    style.describe(figure, f"{_title(found)}; 95 % intervals over images\n{_FILLING}")
    return figure


_FILLING = "filled: clear of zero; open: not"


def _clear(one: Outcome) -> bool:
    """Return whether the interval of a change, over images, excludes zero."""
    assert one.change is not None
    _, low, high = one.change
    return low > 0 or high < 0


def _at_least(limits: tuple[float, float]) -> tuple[float, float]:
    """Widen the limits of an axis in points to 10, so that a tiny change does not fill the figure."""
    low, high = limits
    middle, half = (low + high) / 2, max((high - low) / 2, 5.0)
    return middle - half, middle + half


def _one_at_a_time(found: Sequence[Outcome]) -> bool:
    return all(len(one.layers) == 1 for one in found) and len(found) > len(_by_name(found))


def _by_name(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    out: dict[str, list[Outcome]] = {}
    for one in found:
        out.setdefault(one.replaced, []).append(one)
    return out


def _lines(groups: dict[str, list[Outcome]]) -> list[tuple[tuple[str, list[Outcome]], str, str]]:
    """Return each replacement with its colour and marker."""
    return list(zip(groups.items(), style.colours(len(groups)), style.markers(len(groups)), strict=True))


def _title(found: Sequence[Outcome]) -> str:
    return style.wrapped(f"{found[0].subject}, {found[0].images} images", 54)


def _below(found: Sequence[Outcome]) -> str:
    top1 = found[0].top1
    assert top1 is not None
    return f"change of top-1, points ({top1[0]:.1f} % as it is; 95 % over images)\n{_FILLING}"
