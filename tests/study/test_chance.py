"""Baselines near chance get no verdict in words, claims, tables and JSON; degenerate arms are named."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ablations.epochs import epochs
from ablations.gains import study as gains
from ablations.match import match
from ablations.recipes import recipes
from atdiag.core.runs import Store
from atdiag.reports import document, tables
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.study import aggregate, chance, judging
from atdiag.study.claims import Claim
from atdiag.study.protocol import BASELINE, Footing, Series
from tests import studies
from tests.studies import lab

IMAGES = 400
LABELS = np.arange(IMAGES) % 10
CLAIM = Claim(name="copying helps", text="it does", paper="+5", source="nowhere", arms=("copy",), direction="above")


def outcomes(shares, images=IMAGES, seed=0):
    rng = np.random.default_rng(seed)
    correct = {i: np.arange(images) < round(share * images) for i, share in enumerate(shares)}
    return Outcomes({i: rng.permutation(one) for i, one in correct.items()}, np.arange(images, dtype=np.int32) // 2)


def finish(study, store, shares, labels=LABELS, predicted=None):
    """Make runs: the share of images each seed of an arm gets right; the others are predicted as the next class."""
    rng = np.random.default_rng(0)
    for arm in filter(None, [*study.arms, study.reference]):
        for spec, share in zip(arm.specs, shares[arm.name], strict=True):
            if store.run(spec).finished:
                continue
            n = len(labels)
            right = rng.permutation(np.arange(n) < round(share * n))
            said = np.where(right, labels, (labels + 1) % 10).astype(np.int32)
            if arm.name in (predicted or {}):
                said = np.full(n, predicted[arm.name], np.int32)
            run, buffer = store.create(spec), io.BytesIO()
            np.savez(buffer, prediction=said, label=labels.astype(np.int32), cluster=np.arange(n, dtype=np.int32) // 2)
            run.write("predictions.npz", buffer.getvalue())
            run.finish({"top1": 100 * float((said == labels).mean()), "start": None})


def read(study, store, **more):
    series = study if isinstance(study, Series) else Series.join([study])
    return aggregate.read(series, lab().settings, store, **more)


@pytest.fixture
def copied():
    return replace(gains(lab(seeds=3), "gains", "deit_s", ["copy"]), claims=(CLAIM,))


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "needed"), [(None, 20.0), (90.0, 20.0), (40.0, 20.0), (25.0, 15.0), (10.0, 10.0), (4.0, 10.0)]
)
def test_the_accuracy_that_the_baseline_must_reach(teacher, needed):
    """Chance and ten points, or a third of the way to the teacher; never below chance itself."""
    found = chance.footing(outcomes([0.3, 0.32, 0.31]), LABELS, teacher)
    assert (found.chance, found.needed, found.classes) == (10.0, pytest.approx(needed), 10)


def test_chance_is_the_share_of_the_most_frequent_class():
    labels = np.repeat([0, 1, 2], [240, 100, 60])
    found = chance.footing(outcomes([0.66, 0.66, 0.66]), labels, 95.0)
    assert found.chance == 100 * 240 / 400
    assert found.needed == 70 and found.undertrained  # at 66 %, where always predicting class 0 gives 60


def test_the_lower_limit_is_that_of_the_interval():
    three = outcomes([0.3, 0.34, 0.32])
    assert chance.footing(three, LABELS, None).low == estimate({"x": three}, {"x": 1}).low
    two = outcomes([0.3, 0.4])
    alone = [estimate({"x": Outcomes({0: right}, two.clusters)}, {"x": 1}).low for right in two.correct.values()]
    assert chance.footing(two, LABELS, None).low == min(alone)


@pytest.mark.parametrize(("share", "undertrained"), [(0.13, True), (0.17, True), (0.2, True), (0.30, False)])
def test_13_to_17_per_cent_in_ten_classes_count_as_chance(share, undertrained):
    assert chance.footing(outcomes([share] * 3), LABELS, 80.0).undertrained == undertrained


# --- what follows ----------------------------------------------------------------------------------------------------


def test_no_verdict_is_given(copied, tmp_path):
    store = Store(tmp_path)
    finish(copied, store, {BASELINE: [0.15] * 3, "copy": [0.5, 0.51, 0.52], "teacher": [0.9]})
    found = read(copied, store, equivalence=50)
    (report,) = found.reports
    contrast = report.row("copy").contrast
    assert contrast.low > 25 and not contrast.clear and contrast.within is None and contrast.adjusted is None
    assert report.verdict.startswith("deit_s (mini): undertrained: nothing can be said (scratch reaches 15.0 %")
    assert "`recipe.epochs`=10 (here 4)" in report.verdict and "`data.train`=5000 (here 2500)" in report.verdict
    assert found.verdict == report.verdict
    (judged,) = found.judged
    assert (judged.verdict, judged.note) == ("not testable here", "undertrained: deit_s (mini)")
    notes = tables.notes(found)
    assert any("undertrained: nothing can be said" in note and "chance is 10.0 %" in note for note in notes)
    assert not any("would settle" in note for note in notes)
    assert "undertrained" in tables.markdown(found).split("| copy |")[1].splitlines()[0]
    assert "undertrained" in document.caption(found)
    stands = document.as_json(found)["studies"][0]["chance"]
    assert stands["undertrained"] and stands["top1"] == 10 and stands["needed"] == 20 > stands["baseline_low"]


def test_far_above_chance_nothing_changes(copied, tmp_path):
    store = Store(tmp_path)
    finish(copied, store, {BASELINE: [0.5, 0.49, 0.51], "copy": [0.7, 0.71, 0.72], "teacher": [0.9]})
    found = read(copied, store)
    assert "copying its attention helps (+21.0 points" in found.verdict and "undertrained" not in found.verdict
    assert found.judged[0].verdict == "holds"
    assert not chance.notes(found.reports[0])
    assert document.as_json(found)["studies"][0]["chance"]["undertrained"] is False


def test_a_claim_is_judged_only_by_trained_studies(copied, tmp_path):
    store = Store(tmp_path)
    finish(copied, store, {BASELINE: [0.5, 0.49, 0.51], "copy": [0.7, 0.71, 0.72], "teacher": [0.9]})
    (good,) = read(copied, store).reports
    low = replace(good, footing=Footing(10, 12, 20, 10), study=replace(copied, label="other"))
    judged = judging.judge_claim(CLAIM, [good, low])
    assert (judged.verdict, judged.note) == ("holds", "undertrained: other")
    assert judging.judge_claim(CLAIM, [low]).verdict == "not testable here"


@pytest.mark.parametrize("ablation", [match, recipes])
def test_findings_of_an_undertrained_series_are_undecided_too(ablation, tmp_path):
    series = ablation(lab(seeds=3), teacher="deit_s")
    series = series if isinstance(series, Series) else Series.join([series])
    series = replace(series, studies=tuple(replace(one, measures=()) for one in series.studies))
    arm = series.studies[0].arms[1].name
    finish(series.studies[0], Store(tmp_path), {BASELINE: [0.15] * 3, arm: [0.4] * 3, "teacher": [0.9]})
    found = read(series, Store(tmp_path))
    assert chance.UNDERTRAINED in found.verdict
    own = [one for one in found.judged if one.note == chance.UNDERTRAINED]
    assert len(own) == 2 and {one.verdict for one in own} == {"not testable here"}


def test_short_arms_are_exempt_where_the_length_is_studied(tmp_path):
    series, store = epochs(lab(seeds=3), teacher="deit_s", epochs="1,2"), Store(tmp_path)
    short, long = series.studies
    assert short.short_on_purpose and not long.short_on_purpose
    for one in (short, long):
        finish(one, store, {BASELINE: [0.15] * 3, "copy": [0.4, 0.41, 0.42], "teacher": [0.9]})
    found = read(series, store)
    assert "copying its attention helps" in found.reports[0].verdict
    assert found.reports[1].verdict.startswith("deit_s (mini), 2 epochs: undertrained")
    assert "`epochs`=10 (here 2)" in found.verdict
    assert any("1 epochs is near chance, but is evaluated all the same" in note for note in tables.notes(found))


def test_arms_that_predict_only_one_or_two_classes_are_named(copied, tmp_path):
    store = Store(tmp_path)
    shares = {BASELINE: [0.5, 0.49, 0.51], "copy": [0.1] * 3, "teacher": [0.9]}
    finish(copied, store, shares, predicted={"copy": 3})
    found = read(copied, store)
    assert found.reports[0].row("copy").classes == (1, 1, 1)
    assert "deit_s (mini): copy predicts one class only with 3 of 3 seeds, of 10." in tables.notes(found)
    arm = document.as_json(found)["studies"][0]["arms"][1]
    assert arm["classes_predicted"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("predicted", "classes", "says"),
    [
        ((1,), 10, "one class only"),
        ((2, 10, 10), 10, "two classes only with 1 of 3 seeds,"),
        ((2, 1, 10), 10, "one or two classes only with 2 of 3 seeds,"),
        ((2, 2, 2), 2, ""),  # all there are
        ((1, 2, 2), 2, "one class only with 1 of 3 seeds,"),
        ((3, 3, 3), 10, ""),
    ],
)
def test_the_arms_that_are_named(predicted, classes, says):
    row = SimpleNamespace(classes=predicted, seeds=len(predicted))
    assert chance._few_classes(row, classes) == says


def test_two_seeds_are_undecided_with_a_hint(tmp_path):
    study, store = gains(lab(seeds=2), "gains", "deit_s", ["copy"]), Store(tmp_path)
    finish(study, store, {BASELINE: [0.45, 0.5], "copy": [0.7, 0.75], "teacher": [0.9]})
    found = read(study, store)
    assert "undecided with two seeds" in found.verdict and "undertrained" not in found.verdict
    notes = tables.notes(found)
    assert any(note.startswith("Verdicts begin at three seeds, and here are two: `seeds`=3") for note in notes)
    assert any("Seeds that would settle" in note for note in notes)
    assert found.reports[0].row("copy").contrast.adjusted is None


def test_reports_without_chance_are_not_judged_by_it():
    report = studies.fabricated(gains(lab(seeds=3), "gains", "deit_s", ["copy"]), [5.0])
    assert not report.undertrained and not chance.notes(report)
