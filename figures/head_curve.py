"""Gain against the number of heads whose attention is transferred, by how they are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import layer_curve, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading, Report

_RULES = layer_curve.Curves(
    {"first": (style.BLUE, "o"), "random": (style.VERMILLION, "s"), "different": (style.GREEN, "^")},
    "which",
    "",
    "heads",
)


@style.drawn
def head_curve(report: Report) -> Figure:
    """Draw points above the baseline (k = 0) over k, a line for each rule; bands: the intervals of these contrasts."""
    return layer_curve.one(report, _RULES)


@style.drawn
def head_curves(reading: Reading) -> Figure:
    """Draw the same for several teachers, a panel for each."""
    return layer_curve.several(reading, _RULES)
