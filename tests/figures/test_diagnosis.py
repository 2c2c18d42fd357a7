"""The figure of a diagnosis shows every contrast, and a long title in full."""

import pytest

from figures import diagnosis
from tests.drawings import check
from tests.studies import estimate

ROWS = (
    diagnosis.Row("copy minus scratch", estimate(-5.6, 3.8), "transfer"),
    diagnosis.Row("the maps", estimate(-0.4, 0.8), "accused", 4.0),
    diagnosis.Row("blocks 6-11", estimate(2.9, 1.9), "not accused"),
)


@pytest.mark.parametrize("title", ["diagnose, hub", f"diagnose, timm:{'vit_tiny_patch16_224.augreg_' * 3} (own file)"])
def test_a_diagnosis_shows_its_contrasts(title):
    figure = diagnosis.diagnosis(title, ROWS, 4.0)
    drawn = "".join(check(figure)).replace("\n", "")
    assert title.replace(" ", "") in drawn.replace(" ", "")
    (axes,) = figure.axes
    marked = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in marked] == [-5.6, -0.4, 2.9]
    assert [line.get_markerfacecolor() == "white" for line in marked] == [False, False, True]
