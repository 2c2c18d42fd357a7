"""Reports read from run directories."""

import dataclasses

import pytest

from ablations.reinit import reinit
from atdiag.core.runs import DamagedRunError, Store
from atdiag.study.aggregate import report as read
from atdiag.study.protocol import BASELINE
from tests.studies import finished, lab


def test_reports_are_read_from_run_directories(tmp_path):
    study = reinit(lab())
    right = {BASELINE: [20, 22], "reinit attn": [20, 22], "reinit attn + copy": [30, 31], "teacher": [36]}
    report = finished(study, Store(tmp_path), right)
    assert [row.arm for row in report.rows] == [arm.name for arm in study.arms]
    assert [row.top1 for row in report.rows] == [52.5, 52.5, 76.25]
    assert [row.runs for row in report.rows] == [tuple(spec.id for spec in arm.specs) for arm in study.arms]
    assert report.rows[0].contrast is None
    assert [row.contrast.value for row in report.rows[1:]] == pytest.approx([0.0, 23.75])
    assert [estimate.value for estimate in report.contrasts.values()] == pytest.approx([23.75])
    assert report.rows[2].contrast.images == 40
    assert report.rows[2].contrast.clusters == 20
    assert (report.reference.top1, report.reference.seeds) == (90.0, 1)
    assert report.dropped["reinit attn"] == ("norm_pre.weight", "blocks.*.attn.x")
    assert "weakness" not in report.verdict
    assert "is undecided with two seeds (+0.0 points [+0.0, +0.0])" in report.verdict


def test_predictions_of_another_run_are_refused(tmp_path):
    store, study = Store(tmp_path), reinit(lab())
    right = {BASELINE: [20, 22], "reinit attn": [20, 22], "reinit attn + copy": [30, 31], "teacher": [36]}
    finished(study, store, right)
    one, other = (store.run(spec) for spec in study.arms[2].specs)
    one.predictions.write_bytes(other.predictions.read_bytes())
    with pytest.raises(DamagedRunError, match=r"its sha256 is not the one in result\.json"):
        read(study, lab().settings, store)
    one.predictions.write_bytes(b"nonsense")
    with pytest.raises(DamagedRunError, match=f"atdiag runs remove {one.id}"):
        read(study, lab().settings, store)


def test_a_teacher_below_the_baseline_is_named(tmp_path):
    right = {BASELINE: [20, 22], "reinit attn": [19, 18], "reinit attn + copy": [10, 11], "teacher": [20]}
    assert finished(reinit(lab()), Store(tmp_path), right).verdict.endswith(
        "The teacher itself (50.0 %) is below the baseline (52.5 %): a failure here may be the teacher's weakness and "
        "says nothing about its architecture."
    )


def test_runs_of_different_semantics_are_not_compared():
    study = reinit(lab())
    old = dataclasses.replace(
        study.arms[1], specs=tuple(spec.model_copy(update={"semantics": 0}) for spec in study.arms[1].specs)
    )
    mixed = dataclasses.replace(study, arms=(study.arms[0], old, study.arms[2]))
    with pytest.raises(ValueError, match=r"runs of different semantics can't be compared: \[0, 1\]"):
        read(mixed, lab().settings, None)
