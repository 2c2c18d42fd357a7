"""Figures of several studies: legible in every shape, and they show the measured values."""

import importlib
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atdiag.networks.registry import teachers
from atdiag.reports import writers
from atdiag.study.protocol import BASELINE, Contrast, Footing
from figures import (
    agreement,
    captions,
    epochs,
    gains,
    grid,
    grids,
    head_curve,
    layer_curve,
    losses,
    match,
    recipes,
    rescue,
    style,
)
from tests import series_shapes as shapes
from tests.drawings import check
from tests.figures.test_blockwise import made_up as blocks
from tests.figures.test_crosssize import made_up
from tests.figures.test_gain import made_up as variants
from tests.figures.test_pace import made_up as paces
from tests.figures.test_source import made_up as sources


def joined(drawn) -> set[str]:
    """Join texts without their line breaks."""
    return {text.replace("\n", " ").replace(" ", "") for text in drawn}


def width(reading) -> float:
    return style.COLUMN if len({report.study.teacher.name for report in reading.reports}) == 1 else style.PAGE


def filled(figure, marker="o"):
    """Return whether each single marker is filled, in drawing order."""
    single = [line for axes in figure.axes for line in axes.lines if line.get_marker() == marker]
    return [line.get_markerfacecolor() != "white" for line in single if len(line.get_xdata()) == 1]


@pytest.mark.parametrize("made", shapes.GAINS.values(), ids=shapes.GAINS)
def test_gains(made):
    drawn = joined(check(gains.gains(made)))
    assert {name.replace(" ", "") for name in captions.studies(made.reports)} <= drawn
    assert {f"{report.rows[0].top1:.1f}" for report in made.reports} <= drawn
    assert {f"{r.reference.top1:.1f}" for r in made.reports if r.reference} <= drawn
    assert ("teacher" in drawn) == any(report.reference for report in made.reports)
    known = [name for report in made.reports if (name := report.study.teacher.name) in teachers.registry()]
    titles = {teachers.row(name).title.replace(" ", "") for name in known}
    assert titles <= drawn or len(titles) == 1
    assert any("95%intervals" in text for text in drawn)


def test_gains_shows_each_contrast_once_with_its_interval():
    made = shapes.GAINS["usual"]
    (axes,) = gains.gains(made).axes
    points = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    bars = {tuple(line.get_xdata()) for line in axes.lines if line.get_color() in style.CYCLE and line.get_lw() > 1}
    estimates = [row.contrast for report in made.reports for row in report.rows[1:]]
    assert points == [estimate.value for estimate in estimates]
    assert {(estimate.low, estimate.high) for estimate in estimates} <= bars
    assert filled(axes.figure) == [report.rows[1].contrast.clear for report in made.reports]
    assert True in filled(axes.figure)
    assert False in filled(axes.figure)
    assert not any(filled(gains.gains(shapes.GAINS["corrected"])))
    assert not any(filled(gains.gains(shapes.GAINS["one seed"])))


def test_an_arms_style_does_not_depend_on_the_other_arms():
    from figures import marks

    both = marks.arms(shapes.GAINS["usual"].reports)
    assert marks.arms([shapes.study("deit_s", {"distill": 1.0})])["distill"] == both["distill"]
    others = marks.arms([shapes.study("deit_s", {"new": 1.0, "copy": 1.0, "newer": 1.0, "finetune": 1.0})])
    assert others["copy"] == both["copy"]
    assert len(set(others.values())) == 4


@pytest.mark.parametrize("made", shapes.EPOCHS.values(), ids=shapes.EPOCHS)
def test_epochs(made):
    drawn = joined(check(epochs.epochs(made), width(made)))
    lengths = {int(report.study.options["epochs"]) for report in made.reports}
    assert {str(min(lengths)), f"top-1pointsminus{BASELINE}"} <= drawn
    for of_one in grids.by_teacher(made).values():
        assert f"epochs{captions.levels(of_one)}".replace("\n", " ").replace(" ", "") in drawn
    assert len(lengths) > 4 or {str(length) for length in lengths} <= drawn
    assert str(max(lengths)) in drawn


def test_epochs_draws_contrasts_on_an_axis_of_contrasts():
    made = shapes.EPOCHS["one"]
    (axes,) = epochs.epochs(made).axes
    bars = {tuple(np.round(line.get_ydata(), 9)) for line in axes.lines if len(set(line.get_xdata())) == 1}
    estimates = [row.contrast for report in made.reports for row in report.rows[1:]]
    assert {(round(e.low, 9), round(e.high, 9)) for e in estimates} <= bars
    low, high = min(e.low for e in estimates), max(e.high for e in estimates)
    assert low - 2 < axes.get_ylim()[0] < low and high < axes.get_ylim()[1] < high + 2
    assert sorted(filled(axes.figure) + filled(axes.figure, "s")) == sorted(e.clear for e in estimates)


@pytest.mark.parametrize("made", shapes.LOSSES.values(), ids=shapes.LOSSES)
def test_losses(made):
    assert {"ce", "mse", "jsd", "l1", "weightoftheloss"} <= joined(check(losses.losses(made), width(made)))


def test_losses_shows_what_was_measured():
    made = shapes.LOSSES["one"]
    (axes,) = losses.losses(made).axes
    lines = [
        list(line.get_ydata()) for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 3
    ]
    values = [row.contrast.value for row in made.reports[0].rows[1:]]
    assert lines == [values[i : i + 3] for i in range(0, 12, 3)]


@pytest.mark.parametrize("made", shapes.RESCUES.values(), ids=shapes.RESCUES)
def test_rescue(made):
    drawn = joined(check(rescue.rescue(made)))
    assert {f"{next(iter(report.contrasts.values())).value:+.1f}" for report in made.reports} <= drawn
    assert {name.replace(" ", "") for name in captions.studies(made.reports)} <= drawn


def test_rescue_uses_the_names_of_the_ablations_arms():
    """The figure finds arms and contrasts by name: by the names that the ablation plans."""
    from ablations.rescue import OF_INTEREST
    from ablations.rescue import rescue as planned
    from atdiag.study.builder import Lab
    from atdiag.study.settings import resolve

    study = planned(Lab(resolve("mini")), "dinov2_s", "copy")
    report = shapes.RESCUES["one"].reports[0]
    assert {row.arm for row in report.rows} <= {arm.name for arm in study.arms}
    assert list(report.contrasts) == [contrast.name for contrast in study.contrasts]
    assert study.contrasts[0] == Contrast(OF_INTEREST, study.contrasts[0].weights)


@pytest.mark.parametrize("made", shapes.MATCHES.values(), ids=shapes.MATCHES)
def test_match(made):
    by_block = any(name.startswith("JSD block") for name in made.reports[0].rows[1].numbers)
    figure = match.match(made)
    drawn = joined(check(figure, style.PAGE if by_block else style.COLUMN))
    assert len(figure.axes) == 1 + by_block
    assert {name.replace(" ", "") for name in captions.studies(made.reports)} <= drawn
    measured = [row for report in made.reports for row in report.rows[1:]]
    single = [line for line in figure.axes[-1].lines if len(line.get_xdata()) == 1]
    shown = [line.get_xydata()[0].tolist() for line in single if line.get_marker() != "|"]
    assert [y for _, y in shown] == [row.contrast.value for row in measured]
    for (x, _), row in zip(shown, measured, strict=True):
        assert x == row.numbers["JSD"] or (row.numbers["JSD"] == 0 and abs(x) < 0.1)  # zeros stand side by side
    assert len({x for x, _ in shown}) == len(shown) or made is not shapes.MATCHES["two copied exactly"]
    strokes = [line.get_xydata()[0].tolist() for line in single if line.get_marker() == "|"]
    assert strokes == [[r.rows[0].numbers["JSD heads matched"], 0] for r in made.reports if r.rows[0].numbers]
    assert ("scratch,headsmatched" in drawn) == bool(strokes)


def test_a_title_says_once_which_studies_are_undertrained():
    def title(*low):
        names = ("deit_s", "clip_b", "beitv2_b")
        limits = {name: Footing(10.0, 30.0 if name in low else 50.0, 40.0, 10) for name in names}
        made = [replace(shapes.study(name, {"copy": 1.0}), footing=limits[name]) for name in names]
        return captions.caption(shapes.reading(*made)).splitlines()

    assert not any("undertrained" in line for line in title())
    assert title("deit_s", "beitv2_b")[-1] == "undertrained, nothing can be said: deit_s, beitv2_b"
    assert title("deit_s", "clip_b", "beitv2_b")[-1] == "undertrained, nothing can be said: all 3"


def test_match_needs_a_divergence():
    with pytest.raises(ValueError, match="divergence"):
        match.match(shapes.GAINS["usual"])


@pytest.mark.parametrize("made", shapes.RECIPES.values(), ids=shapes.RECIPES)
def test_recipes(made):
    drawn = joined(check(recipes.recipes(made), style.PAGE))
    assert {name.replace(" ", "") for name in captions.teachers(made.reports)} <= drawn
    assert any("miniatures" in text for text in drawn) == (made.reports[0].profile == "mini")


def test_recipes_marks_the_facts_of_the_registry():
    made = shapes.RECIPES["usual"]
    left, right = recipes.recipes(made).axes
    heads = [label.get_text() for label in right.get_xticklabels()]
    places = {round(place, 6): head for place, head in zip(right.get_xticks(), heads, strict=True)}
    order = sorted(made.reports, key=lambda report: -report.rows[1].contrast.value)
    ys = dict(zip(left.get_yticks(), order, strict=True))
    seen = 0
    for line in right.lines:
        if line.get_marker() != "s":
            continue
        head, report = places[round(float(line.get_xdata()[0]), 6)], ys[line.get_ydata()[0]]
        fact = {"other target": "target"}.get(head, head.replace(" ", "_"))
        row = teachers.row(report.study.teacher.name)
        network = report.study.teacher.network
        parts = (*network.components, *([] if network.class_token else ["no_class_token"]))
        has = bool(getattr(row, fact)) if fact in ("labels", "text", "momentum", "masking", "target") else fact in parts
        # Recipes are those of the published teachers, so grey; components are the miniatures' own.
        own = fact not in ("labels", "text", "momentum", "masking", "target")
        face = (style.INK if own else style.GREY) if has else "white"
        assert line.get_markerfacecolor() == face, (report.study.label, fact)
        seen += 1
    assert seen == 8 * (len(heads) - 2)
    colours = {line.get_markeredgecolor() for line in left.lines if line.get_marker() == "o"}
    assert colours == {style.BLUE, style.VERMILLION, style.GREY}


@pytest.mark.parametrize("made", shapes.CURVES.values(), ids=shapes.CURVES)
def test_layer_curves(made):
    drawn = joined(check(layer_curve.layer_curves(made), width(made)))
    assert "fromthetop" in drawn
    both = made.reports[0].study.options["from"] == "both"
    assert ("fromthebottom" in drawn) == both
    if len(made.reports) == 1:
        assert joined(check(layer_curve.layer_curve(made.reports[0]))) == drawn


def test_curves_from_both_ends_share_k_0_and_all_blocks():
    report = shapes.curve("deit_s", 2.0)
    (axes,) = layer_curve.layer_curve(report).axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 13]
    assert len(lines) == 2
    for line, end in zip(lines, ("bottom", "top"), strict=True):
        arms = [BASELINE, *(f"{end} {k}" for k in range(1, 12)), "all blocks"]
        assert list(line.get_xdata()) == list(range(13))
        assert list(line.get_ydata()) == [0.0, *(report.row(arm).contrast.value for arm in arms[1:])]


@pytest.mark.parametrize("made", shapes.HEAD_CURVES.values(), ids=shapes.HEAD_CURVES)
def test_head_curves(made):
    drawn = joined(check(head_curve.head_curves(made), width(made)))
    assert {"first", "random", "different"} & drawn == set(made.reports[0].study.options["which"].split(","))
    assert any(text.startswith("k:headswhose") for text in drawn)
    if len(made.reports) == 1:
        assert joined(check(head_curve.head_curve(made.reports[0]))) == drawn


@pytest.mark.parametrize("made", shapes.STARTS.values(), ids=shapes.STARTS)
def test_grid(made):
    figure = grid.grid(made)
    drawn = joined(check(figure))
    assert {"randomstart", "pre-trainedstart", "nomaps", "pre-trainedmaps"} <= drawn
    single = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1 and line.get_marker() in "os"]
    values = sorted(float(line.get_xdata()[0]) for line in single)
    assert values == sorted(row.contrast.value for row in made.rows[1:])


def test_a_curve_needs_a_position_for_every_arm():
    with pytest.raises(ValueError, match="a place for every arm"):
        layer_curve.layer_curves(shapes.reading(shapes.study("deit_s", {"top 6": 1.0}, options={"from": "top"})))


def test_a_caption_states_shared_facts_and_the_scale_once():
    made = shapes.GAINS["data sets"]
    assert captions.caption(made) == "benchmark, 2 teachers (mini), 3 seeds, 95 % intervals\nmethods copy,distill"
    assert captions.studies(made.reports) == [
        "deit_s, digits",
        "deit_s, larger",
        "dinov2_s, digits",
        "dinov2_s, larger",
    ]
    alone = shapes.GAINS["data sets of one"]
    assert captions.studies(alone.reports) == ["digits", "larger"]
    assert captions.caption(alone).startswith("benchmark, dinov2_s (mini), 3 seeds")
    timm = shapes.GAINS["timm"]
    assert captions.caption(timm).startswith("benchmark, 4 teachers, profile mini, 3 seeds")
    assert captions.studies(timm.reports)[-1] == "deit_s (mini)"
    assert "images only" in captions.caption(shapes.GAINS["one seed"])
    assert captions.caption(made.reports[0]).startswith("benchmark, deit_s (mini), 3 seeds")
    assert captions.caption(shapes.GAINS["twenty"]).startswith("benchmark, 20 teachers, 3 seeds")
    assert max(map(len, captions.caption(shapes.CURVES["long"]).splitlines())) <= 62
    assert textwrap.dedent(captions.caption(made, style.PAGE)) == captions.caption(made, style.PAGE)


@pytest.mark.parametrize("made", shapes.AGREEMENTS.values(), ids=shapes.AGREEMENTS)
def test_agreement(made):
    figure = agreement.agreement(made)
    drawn = joined(check(figure, style.PAGE))
    numbers = [row.numbers for report in made.reports for row in report.rows]
    cells = [v for one in numbers for name, v in one.items()]
    assert {f"{value:.3f}" for value in cells} <= drawn
    assert len([text for axes in figure.axes for text in axes.texts if "." in text.get_text()]) >= len(cells)
    assert any("pre-trainedteacher" in text for text in drawn)
    assert any("fine-tunedteacher" in text for text in drawn) == any("JSD fine-tuned" in one for one in numbers)


def test_agreement_shades_by_divergence_and_needs_one():
    made = shapes.AGREEMENTS["one"]
    left = agreement.agreement(made).axes[0]
    faces = {round(float(text.get_text()), 3): cell.get_facecolor() for text, cell in zip(left.texts, left.patches)}  # noqa: B905
    light = [sum(faces[value][:3]) for value in sorted(faces)]
    assert light == sorted(light, reverse=True), "the larger the divergence, the darker"
    with pytest.raises(ValueError, match="no divergence"):
        agreement.agreement(shapes.GAINS["usual"])


OF = {
    "agreement": shapes.AGREEMENTS["one"],
    "blockwise": blocks(),
    "contrasts": shapes.GAINS["one"].reports[0],
    "crosssize": made_up(),
    "epochs": shapes.EPOCHS["usual"],
    "gain": variants(),
    "gains": shapes.GAINS["usual"],
    "grid": shapes.STARTS["usual"],
    "head_curve": shapes.HEAD_CURVES["one"].reports[0],
    "head_curves": shapes.HEAD_CURVES["usual"],
    "layer_curve": shapes.CURVES["one"].reports[0],
    "layer_curves": shapes.CURVES["usual"],
    "losses": shapes.LOSSES["usual"],
    "match": shapes.MATCHES["usual"],
    "pace": paces(),
    "recipes": shapes.RECIPES["usual"],
    "rescue": shapes.RESCUES["usual"],
    "source": sources(),
}


def test_every_entry_point_draws_a_print_ready_png_and_a_vector_figure_with_real_text(tmp_path):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["atdiag.figures"]
    assert entries.keys() == OF.keys()
    for name, entry in entries.items():
        module, _, function = entry.partition(":")
        figure = getattr(importlib.import_module(module), function)(OF[name])
        for kind in writers.FIGURE_KINDS:
            (tmp_path / f"figure.{kind}").write_bytes(writers.draw(figure, kind))
        with Image.open(tmp_path / "figure.png") as image:
            assert image.size[0] in (round(300 * style.COLUMN), round(300 * style.PAGE))
        content = (tmp_path / "figure.pdf").read_bytes()
        assert content.startswith(b"%PDF")
        assert b"/CIDFontType2" in content
        assert b"/Subtype /Image" not in content


def test_the_caption_explains_open_markers_and_the_correction():
    assert captions.filling(row.contrast for row in shapes.GAINS["corrected"].reports[0].rows[1:]).count("Holm") == 1
    assert "Holm" not in captions.filling([])


def test_the_legibility_check_detects_violations():
    figure, axes = style.canvas(2.0)
    axes.set_title("of a figure that is fine", loc="left")
    check(figure)
    axes.text(0.5, 0.5, "one text")
    lying = axes.text(0.52, 0.5, "on another")
    with pytest.raises(AssertionError, match="lies on"):
        check(figure)
    lying.set_position((0.97, 0.2))
    lying.set_in_layout(False)
    with pytest.raises(AssertionError, match="is cut"):
        check(figure)
    with pytest.raises(AssertionError):
        check(style.canvas(2.0)[0], style.PAGE)
