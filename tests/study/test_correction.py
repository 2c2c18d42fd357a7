"""Contrasts of all studies in a reading are corrected together."""

from dataclasses import replace
from functools import partial
from inspect import signature

import pytest

from ablations.benchmark import benchmark
from atdiag.cli.experiments import spread
from atdiag.core.runs import Store
from atdiag.stats.contrasts import holm
from atdiag.study import registry
from atdiag.study.aggregate import corrected, read
from atdiag.study.protocol import BASELINE, Contrast, Series
from atdiag.study.verdicts import verb_phrase
from tests.studies import estimate, fabricated, fabricated_series, finished, lab


def test_contrasts_of_all_studies_are_corrected_together(tmp_path):
    store = Store(tmp_path)
    series = spread(partial(benchmark, teacher="deit_s,clip_b", methods="copy,distill"), lab(seeds=3))
    for study, shift in zip(series.studies, (0, 3), strict=True):
        right = {
            BASELINE: [20, 22, 21],
            "copy": [30 + shift, 31, 29],
            "distill": [25, 21 + shift, 23],
            "teacher": [36],
        }
        finished(study, store, right)
    reading = read(series, lab(seeds=3).settings, store)
    found = [row.contrast for report in reading.reports for row in report.rows[1:]]
    assert [e.adjusted for e in found] == pytest.approx(holm([e.p for e in found]))
    # alone, a study with two contrasts is corrected for two
    one = read(Series.join([series.studies[0]]), lab(seeds=3).settings, store).reports[0]
    assert [row.contrast.adjusted for row in one.rows[1:]] == pytest.approx(holm([e.p for e in found[:2]]))


def test_a_shared_contrast_counts_once():
    report = fabricated(benchmark(lab(), "deit_s", "copy"), [3.0])
    (twice, again) = corrected([report, report])
    assert twice.rows[1].contrast.adjusted == again.rows[1].contrast.adjusted == 0.05


def test_arms_with_the_same_runs_are_named_and_counted_once():
    study = benchmark(lab(), "deit_s", "copy")
    scratch, copy = study.arms
    assert not [note for note in study.notes if "same runs" in note]
    more = [replace(scratch, name=name) for name in ("nothing", "none")]
    wide, zero = Contrast("a", {"copy": 2, "nothing": -2}), Contrast("b", {"nothing": 0.3, "none": 0.4, BASELINE: -0.7})
    study = replace(study, arms=(scratch, copy, *more), contrasts=(wide, zero))
    said = "scratch, nothing and none are the same runs here: one condition under 3 names, counted once."
    assert [note for note in study.notes if "same runs" in note] == [said]
    assert replace(study).notes == study.notes
    report = fabricated(study, [3.0, 0.0, 0.0])
    runs = {arm.name: tuple(spec.id for spec in arm.specs) for arm in study.arms}
    report = replace(report, rows=tuple(replace(row, runs=runs[row.arm]) for row in report.rows))
    (one,) = corrected([report])
    adjusted = {row.arm: row.contrast.adjusted for row in one.rows[1:]}
    # two contrasts are tested: copy minus scratch, and twice that
    assert adjusted == {"copy": 0.1, "nothing": None, "none": None}
    assert [e.adjusted for e in one.contrasts.values()] == [0.1, None]


def test_no_experiment_plans_one_condition_under_two_names():
    for one in registry.installed():
        takes = signature(one.function).parameters
        given = {"teacher": "all"} if "teacher" in takes else {"first": "deit_s,hub", "second": "weak,hub_2"}
        every = spread(partial(one.function, **{name: given[name] for name in given if name in takes}), lab(seeds=1))
        for study in every.studies:
            conditions = {(arm.specs[0].id, *(spec.id for spec in arm.partners)) for arm in study.arms}
            assert len(conditions) == len(study.arms), (one.name, study.label)


def test_a_contrast_clear_alone_need_not_be_clear_among_many():
    alone = estimate(3.0, 2.9)
    assert alone.clear
    reports = corrected(fabricated_series({name: [3.0, 3.0] for name in ("deit_s", "clip_b")}, half=2.9))
    # equal runs are one contrast here, so this is a family of one
    assert reports[0].rows[1].contrast.clear
    assert not replace(alone, adjusted=0.2).clear
    assert "can't be told from noise" in verb_phrase(replace(alone, adjusted=0.2), "helps", "hurts")


def test_contrasts_of_one_seed_are_not_corrected():
    (report,) = corrected(fabricated_series({"deit_s": [3.0, 9.0]}, seeds=1))
    assert [row.contrast.adjusted for row in report.rows[1:]] == [None, None]


def test_equivalence_is_reported_where_requested_and_found():
    (report,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4), equivalence=0.5)
    near, far = (row.contrast for row in report.rows[1:])
    assert (near.within, far.within) == (0.5, None)
    assert verb_phrase(near, "helps", "hurts").startswith("makes no difference of 0.5 points (+0.1")
    (unasked,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4))
    assert unasked.rows[1].contrast.within is None
