"""The figure of crosssize shows the measured contrasts, each size beside its baseline."""

from atdiag.study.protocol import Reading
from figures import crosssize
from tests.drawings import check
from tests.studies import fabricated, lab


def made_up() -> Reading:
    """Make a reading of two sizes."""
    from ablations.crosssize import crosssize as planned

    series = planned(lab(), "deit_b")
    effects = [(4.0, -2.0, 6.0, 9.0, 1.5), (3.0, 0.5)]
    reports = tuple(
        fabricated(study, some, base=base)
        for study, some, base in zip(series.studies, effects, (31.2, 43.7), strict=True)
    )
    return Reading(series, reports, (), "")


def test_crosssize_shows_each_gain_above_its_own_baseline():
    figure = crosssize.crosssize(made_up())
    drawn = " ".join(check(figure))
    assert all(text in drawn for text in ("31.2 %", "43.7 %", "teacher: 90.0 %", "copy", "distill"))
    (axes,) = figure.axes
    points = [float(line.get_ydata()[0]) for line in axes.lines if len(line.get_ydata()) == 1]
    assert points == [4.0, -2.0, 3.0, 0.5]  # not the arms of the other size, above another baseline
