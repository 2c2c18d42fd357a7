"""Legibility checks and made-up estimates for the tests of figures."""

import itertools
import warnings

import pytest

from atdiag.stats.contrasts import Estimate
from figures import style


def estimate(value, half, seeds=3, **more) -> Estimate:
    """Make a contrast of so many points with an interval of that half width."""
    return Estimate(
        value=value, low=value - half, high=value + half, level=0.95, p=0.05, seeds=seeds, images=2396, clusters=599,
        df=2.0, se=half / 4.3, covers="images only" if seeds == 1 else "seeds and images",
        var_seed=None, var_cluster=0.0, var_residual=None, **more,
    )  # fmt: skip


def texts(figure):
    """Return all drawn texts with their extents in pixels."""
    renderer = figure.canvas.get_renderer()
    found = [*figure.texts, *(t for t in (figure._suptitle, figure._supxlabel) if t is not None)]
    found += [text for legend in figure.legends for text in (*legend.get_texts(), legend.get_title())]
    for axes in figure.axes:
        found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            found += [label for t in shown for label in (t.label1, t.label2)]
    return {t: t.get_window_extent(renderer) for t in found if t.get_visible() and t.get_text().strip()}


def check(figure, width=style.COLUMN):
    """Lay out a figure as it is printed; check that its texts neither overlap nor leave it; return them.

    Without pixels, which decide nothing about where a text stands: that all figures can be written is tested once.
    """
    figure.set_dpi(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    assert figure.bbox.width == pytest.approx(300 * width, abs=1)
    boxes = texts(figure)
    assert boxes
    frame = figure.bbox
    for text, box in boxes.items():
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert inside, f"{text.get_text()!r} is cut"
    smaller = {text: box.padded(-0.5) for text, box in boxes.items()}
    for (one, a), (other, b) in itertools.combinations(smaller.items(), 2):
        if one not in (figure._suptitle, figure._supxlabel) or other not in (figure._suptitle, figure._supxlabel):
            assert not a.overlaps(b), f"{one.get_text()!r} lies on {other.get_text()!r}"
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.get_visible()]
    columns = len({round(axes.get_position().x0, 2) for axes in panels})
    for axes in panels:
        assert axes.get_window_extent().width > figure.bbox.width / 4 / columns, "there is no room to see anything"
    return {text.get_text() for text in boxes}
