"""Contrasts of all studies that are read together are corrected together."""

from dataclasses import replace
from functools import partial

import pytest

from ablations.benchmark import benchmark
from atdiag.cli.experiments import spread
from atdiag.core.runs import Store
from atdiag.stats.contrasts import holm
from atdiag.study.aggregate import corrected, read
from atdiag.study.protocol import BASELINE, Series
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
    # alone, two of them are corrected for two
    one = read(Series.join([series.studies[0]]), lab(seeds=3).settings, store).reports[0]
    assert [row.contrast.adjusted for row in one.rows[1:]] == pytest.approx(holm([e.p for e in found[:2]]))


def test_a_contrast_that_studies_share_counts_once():
    report = fabricated(benchmark(lab(), "deit_s", "copy"), [3.0])
    (twice, again) = corrected([report, report])
    assert twice.rows[1].contrast.adjusted == again.rows[1].contrast.adjusted == 0.05


def test_what_is_clear_alone_need_not_be_so_among_many():
    alone = estimate(3.0, 2.9)
    assert alone.clear
    reports = corrected(fabricated_series({name: [3.0, 3.0] for name in ("deit_s", "clip_b")}, half=2.9))
    # equal numbers from runs with equal names are one contrast here, so this is a family of one
    assert reports[0].rows[1].contrast.clear
    assert not replace(alone, adjusted=0.2).clear
    assert "can't be told from noise" in verb_phrase(replace(alone, adjusted=0.2), "helps", "hurts")


def test_one_seed_is_not_corrected():
    (report,) = corrected(fabricated_series({"deit_s": [3.0, 9.0]}, seeds=1))
    assert [row.contrast.adjusted for row in report.rows[1:]] == [None, None]


def test_equivalence_is_said_where_it_was_asked_for_and_found():
    (report,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4), equivalence=0.5)
    near, far = (row.contrast for row in report.rows[1:])
    assert (near.within, far.within) == (0.5, None)
    assert verb_phrase(near, "helps", "hurts").startswith("makes no difference of 0.5 points (+0.1")
    (unasked,) = corrected(fabricated_series({"deit_s": [0.1, 3.0]}, half=0.4))
    assert unasked.rows[1].contrast.within is None
