"""Transfer on turned images."""

import pytest

from ablations.benchmark import benchmark
from ablations.shift import shift
from atdiag.core.errors import UserError
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab


def test_arms_differ_only_in_the_turn():
    study = shift(lab(), "deit_s")
    made = arms(study)
    assert list(made) == [
        BASELINE,
        "copy",
        *(f"{name}, turned by {angle}" for angle in (90, 180) for name in (BASELINE, "copy")),
    ]
    usual = arms(benchmark(lab(), "deit_s", "copy"))
    assert (made[BASELINE], made["copy"]) == (usual[BASELINE], usual["copy"])
    for name in (BASELINE, "copy"):
        assert differences(study, name, f"{name}, turned by 90") == {"data.turns"}
    assert [made[f"copy, turned by {angle}"].data.turns for angle in (90, 180)] == [1, 2]


def test_the_change_of_the_gain_is_a_difference_of_differences():
    study = shift(lab(), "deit_s", turned="180")
    change, gain = (one.weights for one in study.contrasts)
    top1 = {BASELINE: 50.0, "copy": 70.0, f"{BASELINE}, turned by 180": 51.0, "copy, turned by 180": 60.0}
    values = [sum(weight * top1[arm] for arm, weight in one.items()) for one in (change, gain)]
    assert values == [-11.0, 9.0]


@pytest.mark.parametrize(("value", "said"), [(-4.0, "holds"), (4.0, "does not hold"), (-0.5, "undecided")])
def test_the_claim_follows_from_the_change_of_the_gain_alone(value, said):
    study = shift(lab(), "deit_s")
    changes = [value if "copy: turned" in one.name else 9.0 for one in study.contrasts]
    report = fabricated(study, [9.0] * 5, changes)
    (claim,) = study.claims
    assert changes.count(value) == 2
    assert judge_claim(claim, [report]).verdict == said
    if said == "holds":
        assert "turned by 90 the gain shrinks (-4.0" in study.verdict(report)


def test_where_images_are_mirrored_only_the_half_turn_is_as_hard():
    mirrored = shift(lab("recipe.flip=true"), "deit_s")
    assert mirrored.options["turned"] == "180"
    assert any("as hard" in note for note in mirrored.notes)
    quarter = shift(lab("recipe.flip=true"), "deit_s", turned="90,180")
    assert any("turned by 90 they are not exactly as hard" in note for note in quarter.notes)


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ((), {"turned": "45"}, "`turned` '45'"),
        ((), {"transfer": "copi"}, "did you mean 'copy'"),
        (("data.turns=1",), {}, "`data.turns` turns what shift compares"),
    ],
)
def test_wrong_options(sets, options, message):
    with pytest.raises(UserError, match=message):
        shift(lab(*sets), "deit_s", **options)
