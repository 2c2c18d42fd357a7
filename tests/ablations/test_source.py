"""Architecture or pre-training: what is planned, and what is said of which contrasts."""

from pathlib import Path

import pytest

from ablations import source
from atdiag.core.errors import UserError
from atdiag.study.builder import Lab
from atdiag.study.settings import resolve
from tests.figures.test_source import FIRST, SECOND, made_up
from tests.studies import arms, differences, lab


def planned(first=FIRST, second=SECOND, **more):
    return source.source(lab(), first, second, **more)


def test_all_teachers_have_one_student_and_one_baseline_at_each_budget():
    short, full = planned(kinds="supervised,mae", budgets="2500x4,1000x4").studies
    assert len(full.arms) == 1 + 6 + 12
    for name in ("deit_s (mini), supervised: copy", "hub (specimen), mae: copy"):
        assert differences(full, "scratch", name) >= {"teacher", "transfer.method"}
    assert differences(full, "deit_s (mini), supervised: copy", "hub (specimen), mae: copy") == {"teacher"}
    assert (arms(short)["scratch"].data.train, arms(full)["scratch"].data.train) == (1000, 2500)
    assert short.short_on_purpose and not full.short_on_purpose
    probes = [{arm.name: arm.specs for arm in study.arms if arm.probed} for study in (short, full)]
    assert probes[0] == probes[1], "a teacher's accuracy is one number at all budgets"
    seeds = {spec.seed for spec in probes[0]["hub (specimen), mae: probe"]}
    assert seeds == {spec.seed for spec in full.arms[0].specs}
    assert arms(full)["hub (specimen), mae: probe"].data.train == 2500


def test_the_contrasts_sum_up_the_gains():
    """Oracle: the formula of each contrast on a table of gains, and the baseline cancels."""
    study = planned(kinds="a,b", budgets="500x1", methods="copy").studies[0]
    gains = {"deit_s (mini)": (5.0, 1.0), "dinov2_s (mini)": (7.0, 6.0), "hub (specimen)": (-2.0, 3.0)}
    value = {f"{pair}, {kind}: copy": x for pair, both in gains.items() for kind, x in zip("ab", both, strict=True)}
    found = {c.name: sum(weight * value[arm] for arm, weight in c.weights.items()) for c in study.contrasts}
    assert all(sum(c.weights.values()) == pytest.approx(0) for c in study.contrasts)
    assert {name: round(x, 9) for name, x in found.items() if not name.endswith("log-odds")} == {
        "copy: b minus a, deit_s (mini)": -4,
        "copy: b minus a, dinov2_s (mini)": -1,
        "copy: b minus a, hub (specimen)": 5,
        "copy: b minus a, mean": 0,
        "copy: dinov2_s (mini) minus deit_s (mini), mean": 3.5,
        "copy: b minus a, dinov2_s (mini) minus deit_s (mini)": 3,
        "copy: hub (specimen) minus deit_s (mini), mean": -2.5,
        "copy: b minus a, hub (specimen) minus deit_s (mini)": 9,
    }
    by_scale = [{c.name: c.weights for c in study.contrasts if c.scale == scale} for scale in ("points", "log-odds")]
    assert {source.odds(name): weights for name, weights in by_scale[0].items()} == by_scale[1]


def test_one_pair_asks_for_the_pre_training_alone():
    (study,) = planned("deit_s", "weak", budgets="500x1", methods="copy").studies
    assert [c.name for c in study.contrasts] == [
        "copy: second minus first, deit_s (mini)",
        "copy: second minus first, deit_s (mini), log-odds",
    ]


def test_what_a_plan_without_weights_cannot_tell_is_said():
    paper = Lab(resolve("paper", 1, (), environment={}, folder=Path("/nonexistent")))
    (study,) = source.source(paper, "dino_b", "mae_b", budgets="20").studies
    assert "dino_b is dino_b (first) and mae_b (second)." in study.notes
    assert any("can't be told apart without their weights" in note for note in study.notes)


MAIN = "copy: mae minus supervised, mean"
PARTS = ("copy: dinov2_s (mini) minus deit_s (mini), mean", "copy: hub (specimen) minus deit_s (mini), mean")
CROSSED = tuple(
    f"copy: mae minus supervised, {name} minus deit_s (mini)" for name in ("dinov2_s (mini)", "hub (specimen)")
)


@pytest.mark.parametrize(
    ("clear", "said"),
    [
        ((MAIN,), "goes with the pre-training (mae minus supervised +6.0 points"),
        (PARTS[1:], "goes with the architecture (mae minus supervised +1.0 points"),
        ((MAIN, *PARTS), "goes with both the pre-training and the architecture ("),
        ((), "goes clearly with neither the pre-training nor the architecture ("),
    ],
)
def test_the_outcome_goes_with_what_is_clear_on_both_scales(clear, said):
    values = {name: 6.0 if name in clear else 1.0 for name in (MAIN, *PARTS, *CROSSED)}
    verdict = made_up(budgets="500x1", contrasts=values).verdict
    assert f"500 images x 1 epoch, copy: the outcome {said}" in verdict
    assert "depends on the architecture" not in verdict.partition("distill:")[0]
    assert "Too weak" not in verdict and "Unmatched" not in verdict


def test_an_interaction_is_said_with_its_architectures():
    verdict = made_up(budgets="500x1", contrasts={CROSSED[1]: 6.0, CROSSED[0]: 1.0}).verdict
    assert "the difference between the two depends on the architecture: deit_s (mini) and hub (specimen) dif" in verdict


def test_weak_teachers_are_named():
    verdict = made_up(budgets="500x1", probe=0.5).verdict
    assert "Too weak here, not clearly above scratch (40.0 %): deit_s (mini) supervised (40.5 %)" in verdict


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"second": "weak,gated"}, "`first` names 3, `second` 2 of the teachers"),
        ({"second": "gated,weak,hub_2"}, r"deit_s \(mini\) \(no native part\) and gated .* are of two architectures"),
        ({"second": "weak,dinov2_s,hub_2"}, "are the same weights"),
        ({"first": "deit_s,deit_b", "second": "weak,deit_b"}, "the standard students of .* differ|same weights"),
        ({"first": "deit_s,deit_s", "second": "weak,weak"}, "two teachers of `first` are called deit_s"),
        ({"first": " , "}, "`first` is empty"),
        ({"kinds": "mae"}, "not two different names"),
        ({"methods": "finetune"}, "`methods` 'finetune'"),
        ({"budgets": "x"}, "is no budget"),
    ],
)
def test_wrong_pairs_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        planned(**{"first": FIRST, "second": SECOND} | asked)
