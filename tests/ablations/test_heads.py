"""The curve over the number of transferred heads."""

import pytest

from ablations.benchmark import benchmark
from ablations.heads import drawn, heads
from atdiag.core.errors import UserError
from atdiag.core.spec import Seed
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab

RULES = "first,random,different"


def test_arms_differ_only_in_the_heads():
    study = heads(lab(), "deit_b", which=RULES)
    assert set(arms(study)) == {BASELINE, *(f"{rule} {k}" for rule in RULES.split(",") for k in (1, 2)), "all heads"}
    assert differences(study, "all heads", "first 2") == {"transfer.heads"}
    assert differences(study, "all heads", "random 1") == {"transfer.heads"}
    assert differences(study, "all heads", "different 2") == {"transfer.different_heads"}
    made = arms(study)
    assert made["all heads"] == arms(benchmark(lab(), "deit_b", "copy"))["copy"]
    assert made["first 2"].transfer.heads == (0, 1)
    assert made["different 2"].transfer.different_heads == 2
    assert study.curve == {BASELINE: 0, "all heads": 3} | {
        f"{rule} {k}": k for rule in RULES.split(",") for k in (1, 2)
    }


def test_random_heads_are_part_of_the_spec_and_other_ones_for_each_seed():
    study = heads(lab(seeds=20), "deit_b", which="random")
    by_count = {arm.name: [spec.transfer.heads for spec in arm.specs] for arm in study.arms}
    assert by_count["random 1"] == [drawn(Seed(data=i, model=i), 1, 3) for i in range(20)]
    assert {*by_count["random 1"]} == {(0,), (1,), (2,)}
    assert {*by_count["random 2"]} == {(0, 1), (0, 2), (1, 2)}
    assert all(set(one) < set(two) for one, two in zip(by_count["random 1"], by_count["random 2"], strict=True))
    assert drawn(Seed(data=5, model=0), 2, 3) == drawn(Seed(data=0, model=0), 2, 3)  # as the initialisation


def test_random_heads_are_uniform():
    counts = [0] * 6
    for seed in range(600):
        for head in drawn(Seed(data=0, model=seed), 2, 6):
            counts[head] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 20  # chi-squared, 5 degrees of freedom: p > 0.001


def test_settings_of_heads_do_not_reach_other_rules():
    set_ = heads(lab("transfer.heads=first:1"), "deit_b", which="different")
    assert arms(set_) == arms(heads(lab(), "deit_b", which="different"))


def test_the_curve_flattens_by_a_contrast_that_is_zero_for_a_straight_line():
    study = heads(lab(), "deit_b", which="first")
    (share,) = (one for one in study.contrasts if "share" in one.name)
    straight = {name: 10.0 + 7.0 * k for name, k in study.curve.items()}
    assert sum(weight * straight[arm] for arm, weight in share.weights.items()) == pytest.approx(0)
    flat = straight | {"all heads": straight["first 2"]}
    assert sum(weight * flat[arm] for arm, weight in share.weights.items()) == pytest.approx(-14 / 3)


@pytest.mark.parametrize(("grows", "beyond", "said"), [(9.0, -9.0, "holds"), (-9.0, 9.0, "does not hold")])
def test_the_claims_follow_from_their_contrasts(grows, beyond, said):
    study = heads(lab(), "deit_b", which="first,different")
    values = [beyond if "share" in one.name else grows if one.name.startswith("all") else 0 for one in study.contrasts]
    report = fabricated(study, [20.0] * (len(study.arms) - 1), values)
    assert [judge_claim(claim, [report]).verdict for claim in study.claims] == [said, said]
    clip = heads(lab(), "clip_b", which="first")
    other = fabricated(clip, [-20.0] * 3, [grows, beyond])
    assert [judge_claim(claim, [other]).verdict for claim in clip.claims] == ["not testable here"] * 2


def test_the_verdict_names_what_the_last_heads_give():
    study = heads(lab(), "deit_b")
    said = study.verdict(fabricated(study, [5.0, 9.0, 10.0], [5.0, -4.0]))
    assert said.startswith("Copy of heads of deit_b (mini): first 1 helps (+5.0")
    assert "the last 1 beyond first 2 give less than their share (-4.0" in said


def test_all_heads_alone_are_a_study():
    study = heads(lab(), "deit_b", counts="3")
    assert (list(arms(study)), study.contrasts) == ([BASELINE, "all heads"], ())
    assert "all 3 helps" in study.verdict(fabricated(study, [9.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "frist"}, "`which` 'frist', did you mean 'first'"),
        ({"counts": "0"}, "`counts` '0': deit_b .mini. has 3 heads"),
        ({"counts": "4"}, "`counts` '4'"),
        ({"counts": "1,x"}, "`counts` 'x'"),
        ({"transfer": "distil"}, "did you mean 'distill'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        heads(lab(), "deit_b", **options)
