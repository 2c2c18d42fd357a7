"""Ensembles of a fine-tuned and a distilled student, and their controls of one kind."""

from dataclasses import replace

import numpy as np
import pytest

from ablations.benchmark import benchmark
from ablations.ensemble import ensemble
from atdiag.core.errors import UserError
from atdiag.core.runs import Store
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.study.aggregate import report as read
from atdiag.study.builder import Lab
from atdiag.study.judging import judge_claim
from atdiag.study.pipeline import unmeasured
from atdiag.study.protocol import BASELINE, Series
from atdiag.training.predictions import Predictions, about_pair
from tests.studies import fabricated, finished, lab

BOTH = "finetune + distill"
CONTROLS = ("two of finetune", "two of distill")


def test_all_runs_are_those_of_the_benchmark_with_twice_as_many_seeds():
    study = ensemble(lab(seeds=3), "deit_s")
    usual = benchmark(lab(seeds=6), "deit_s", "finetune,distill")
    assert {spec.id for spec in study.specs} <= {spec.id for spec in usual.specs}
    by_name = {arm.name: arm for arm in usual.arms}
    tune, distill = by_name["finetune"].specs, by_name["distill"].specs
    arms = {arm.name: (arm.specs, arm.partners) for arm in study.arms}
    assert arms == {
        BASELINE: (by_name[BASELINE].specs[:3], ()),
        "finetune": (tune[:3], ()),
        "distill": (distill[:3], ()),
        BOTH: (tune[:3], distill[3:]),
        "two of finetune": (tune[:3], tune[3:]),
        "two of distill": (distill[:3], distill[3:]),
    }
    for arm in study.arms:  # no run is in two seeds' outcomes of one arm
        assert len({spec.id for spec in arm.every_spec}) == len(arm.every_spec)


def test_an_ensemble_is_a_condition_of_its_own():
    """The arms of one method and its pair share their first runs, and are not said to be the same."""
    assert not any("same runs" in note for note in ensemble(lab(), "deit_s").notes)


@pytest.mark.parametrize(("value", "said"), [(4.0, "holds"), (-4.0, "does not hold"), (0.5, "undecided")])
def test_the_claims_follow_from_their_contrasts(value, said):
    study = ensemble(lab(), "deit_s")
    assert [set(one.weights) for one in study.contrasts] == [
        {BOTH, than} for than in ("finetune", "distill", *CONTROLS)
    ]
    for claim, which in zip(study.claims, (slice(0, 2), slice(2, 4)), strict=True):
        for sign in (1, 3):  # other contrasts do not matter
            values = [9.0 * sign] * 4
            values[which] = [value] * 2
            report = fabricated(study, [9.0] * 5, values)
            assert judge_claim(claim, [report]).verdict == said


def test_the_verdict_names_every_comparison():
    study = ensemble(lab(), "deit_s")
    said = study.verdict(fabricated(study, [9.0] * 5, [3.0, 4.0, -2.0, 0.0]))
    assert said.startswith(f"deit_s (mini), {BOTH}: against finetune it is better (+3.0")
    assert "against two of finetune it is worse (-2.0" in said


def test_numbers_come_from_the_stored_predictions_of_pairs(tmp_path):
    """Accuracy and contrast of an ensemble, by hand."""
    study = replace(ensemble(lab(), "deit_s"), reference=None)
    store, images = Store(tmp_path / "runs"), 40
    usual = replace(benchmark(lab(seeds=4), "deit_s", "finetune,distill"), reference=None)
    finished(usual, store, {BASELINE: [10] * 4, "finetune": [20, 22, 21, 23], "distill": [18, 20, 19, 17]})
    assert {spec.id for spec in unmeasured([Series.join([study])], store)} == {
        spec.id for arm in study.arms[3:] for spec in arm.specs
    }
    label, together = np.arange(images, dtype=np.int32) % 10, {}
    for i, arm in enumerate(study.arms[3:]):
        for seed, (one, other) in enumerate(zip(arm.specs, arm.partners, strict=True)):
            hit = np.arange(images) < 25 + i + seed
            together[arm.name, seed] = hit
            pair = store.run(one), store.run(other)
            found = Predictions(
                np.where(hit, label, (label + 1) % 10).astype(np.int32),
                label,
                np.arange(images, dtype=np.int32) // 2,
                np.zeros(images, np.float32),
            )
            pair[0].ensemble(other.id).parent.mkdir(exist_ok=True)
            pair[0].ensemble(other.id).write_bytes(found.to_bytes(about_pair(*pair)))
    assert not unmeasured([Series.join([study])], store)
    report = read(study, lab().settings, store)
    row = report.row(BOTH)
    assert (row.top1, row.seeds) == (pytest.approx(100 * 25.5 / images), 2)
    assert row.runs == tuple(spec.id for spec in study.arms[3].every_spec)
    clusters = np.arange(images, dtype=np.int32) // 2
    by_hand = estimate(
        {
            BOTH: Outcomes({seed: together[BOTH, seed] for seed in (0, 1)}, clusters),
            "distill": Outcomes({0: np.arange(images) < 18, 1: np.arange(images) < 20}, clusters),
        },
        {BOTH: 1, "distill": -1},
    )
    ours = report.contrasts[f"{BOTH} minus distill"]
    assert (ours.value, ours.low, ours.high) == pytest.approx((by_hand.value, by_hand.low, by_hand.high))


def test_wrong_options():
    with pytest.raises(UserError, match="`transfer` 'finetune'"):
        ensemble(lab(), "deit_s", "finetune")
    settings = lab().settings
    last = replace(settings, seeds=tuple(one.model_copy(update={"data": 999_998}) for one in settings.seeds))
    with pytest.raises(UserError, match="`first_seed` leaves no seeds"):
        ensemble(Lab(last), "deit_s")
