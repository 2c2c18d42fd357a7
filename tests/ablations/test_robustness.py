"""Fine-tuned and distilled students of equal accuracy."""

import numpy as np
import pytest

from ablations.robustness import TUNED, robustness
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.data import testsets
from atdiag.study.aggregate import read
from atdiag.study.judging import judge_claim
from atdiag.training.predictions import Predictions
from tests.studies import fabricated, lab

SHIFTED = f"shifted: distill minus {TUNED}"


def test_candidates_differ_in_their_number_of_images_alone():
    series = robustness(lab(), "deit_s", on="clean,contrast:5")
    clean, shifted = series.studies
    assert [study.test_set for study in series.studies] == [None, "contrast:5"]
    assert [list(study.contrasts[0].weights.values()) for study in series.studies] == [[1, -1]] * 2
    assert [study.contrasts[0].name for study in series.studies] == [f"near: distill minus {TUNED}", SHIFTED]
    assert clean.arms == shifted.arms
    equal = clean.arms[-1].equal
    for seed, (some, other) in enumerate(zip(equal.candidates, equal.to, strict=True)):
        assert other == clean.arms[1].specs[seed]
        assert [spec.data.train for spec in some] == [156, 208, 250, 312, 357, 416, 625, 1250, 2500]
        (only,) = {spec.model_copy(update={"data": spec.data.model_copy(update={"train": 1})}).id for spec in some}
        assert only
        assert {spec.data.validation for spec in (*some, other)} == {500}
        assert {spec.seed.data for spec in (*some, other)} == {seed}
    assert {spec.id for some in equal.candidates for spec in some} <= {spec.id for spec in clean.specs}


def test_a_share_for_validation_becomes_a_number():
    """A share of fewer training images would be other validation images."""
    study = robustness(lab("data.validation=0.1"), "deit_s", on="clean").studies[0]
    assert {spec.data.validation for spec in study.arms[-1].every_spec} == {250}
    small = robustness(lab("data.train=100"), "deit_s", on="clean").studies[0]
    assert [spec.data.train for spec in small.arms[-1].equal.candidates[0]] == [32, 50, 100]  # a batch at least


def test_the_nearest_on_the_validation_part_is_taken_for_each_seed(tmp_path):
    """Whatever the test images say; of equally near ones the one with fewer images."""
    series = robustness(lab(seeds=2), "deit_s", on="clean,contrast:5")
    store, count = Store(tmp_path / "runs"), 40
    label = np.arange(count, dtype=np.int32) % 10
    clusters = np.arange(count, dtype=np.int32) // 2
    baseline, passed, tuned = series.studies[0].arms
    reference = series.studies[0].reference.specs
    validated = {
        spec.id: [40, 50, 60, 70, 80, 90, 95, 96, 97][i]
        for some in tuned.equal.candidates
        for i, spec in enumerate(some)
    }
    validated |= {passed.specs[0].id: 68.0, passed.specs[1].id: 55.0, **{spec.id: 30.0 for spec in baseline.specs}}
    right = {passed.specs[0].id: (20, 8), passed.specs[1].id: (22, 10)}
    right |= {tuned.equal.candidates[0][3].id: (19, 12), tuned.equal.candidates[1][1].id: (21, 16)}

    def predictions(hits) -> Predictions:
        prediction = np.where(np.arange(count) < hits, label, (label + 1) % 10).astype(np.int32)
        return Predictions(prediction, label, clusters, np.zeros(count, np.float32))

    for spec in {spec.id: spec for spec in (*series.specs, *reference)}.values():
        run, (own, there) = store.create(spec), right.get(spec.id, (39, 39))
        run.write("predictions.npz", predictions(own).to_bytes())
        run.finish({"top1": 100 * own / count, "start": None, "validation_top1": validated.get(spec.id)})
        about = {"run": run.id, "test_set": "contrast:5", "semantics": testsets.SEMANTICS, "images": count}
        path = run.ood(testsets.find("contrast:5").file)
        path.parent.mkdir()
        path.write_bytes(predictions(there).to_bytes(about, None))
    clean, shifted = read(series, lab().settings, store).reports
    chosen = tuned.equal.candidates[0][3].id, tuned.equal.candidates[1][1].id
    for report in (clean, shifted):
        assert report.row(TUNED).runs == chosen
        assert report.row(TUNED).numbers == {"validation top-1": 60.0, "training images": (312 + 208) / 2}
    assert clean.row(TUNED).top1 == pytest.approx(50.0)
    assert clean.contrasts[f"near: distill minus {TUNED}"].value == pytest.approx(100 / count)
    assert shifted.contrasts[SHIFTED].value == pytest.approx(-100 * 5 / count)
    assert "on the validation part 61.5 and 60.0 %" in shifted.verdict


@pytest.mark.parametrize(("value", "said"), [(-4.0, "holds"), (4.0, "does not hold"), (0.2, "undecided")])
def test_the_claim_is_about_large_shifts_alone(value, said):
    series = robustness(lab(), "deit_s", on="clean,contrast:5,imagenet-v2,imagenet-r")
    (claim,) = series.claims
    large = [SHIFTED in {one.name for one in study.contrasts} for study in series.studies]
    assert large == [False, True, False, True]
    reports = [
        fabricated(study, [9.0, 9.0], [value if is_large else -value])
        for study, is_large in zip(series.studies, large, strict=True)
    ]
    assert judge_claim(claim, reports).verdict == said
    assert ("is worse (-4.0" in reports[1].study.verdict(reports[1])) == (said == "holds")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on": "contrst"}, "did you mean 'contrast'"), ({"transfer": "distil"}, "did you mean 'distill'")],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        robustness(lab(), "deit_s", **options)
