"""The ablations of the 2024 paper that vary which part of the attention is transferred."""

import pytest

from ablations.averages import averages
from ablations.benchmark import benchmark
from ablations.tensors import tensors
from atdiag.core.errors import UserError
from atdiag.study.judging import judge_claim
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, fabricated, lab


def test_arms_differ_only_in_the_tensor():
    study = tensors(lab(), "deit_s")
    methods, names = ("copy", "distill"), ("map", "q", "k", "v")
    assert list(arms(study)) == [BASELINE, *(f"{method} {name}" for method in methods for name in names)]
    assert differences(study, "copy map", "copy q") == {"transfer.tensor"}
    assert differences(study, "distill q", "distill v") == {"transfer.tensor"}
    usual = arms(benchmark(lab(), "deit_s", "copy,distill"))
    assert [usual[method] for method in methods] == [arms(study)[f"{method} map"] for method in methods]


def test_arms_differ_only_in_the_average():
    study = averages(lab(), "deit_s")
    assert differences(study, "maps", "maps averaged over queries") == {"transfer.average"}
    assert arms(study)["maps"] == arms(benchmark(lab(), "deit_s", "copy"))["copy"]


def test_the_claims_follow_from_their_contrasts():
    """q above the map, and a loss by both averages; and the opposite."""
    for study, worse in ((tensors(lab(), "deit_s", "copy"), -1), (averages(lab(), "deit_s"), 1)):
        (claim,) = study.claims
        for sign, verdict in ((-worse, "holds"), (worse, "does not hold")):
            report = fabricated(study, [9.0] * (len(study.arms) - 1), [9.0 * sign] * len(study.contrasts))
            assert judge_claim(claim, [report]).verdict == verdict


def test_verdicts_name_what_is_lost():
    study = averages(lab(), "deit_s", over="examples,heads")
    report = fabricated(study, [9.0, 1.0, 9.0], [-8.0, 0.0])
    said = study.verdict(report)
    assert said.startswith("Copy of the maps of deit_s (mini) helps (+9.0")
    assert "averaging over examples loses (-8.0" in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tensors(lab(), "deit_s", tensors="map,z"), "`tensors` 'z'"),
        (lambda: tensors(lab(), "deit_s", methods="copi"), "`methods` 'copi', did you mean 'copy'"),
        (lambda: averages(lab(), "deit_s", over="exemples"), "`over` 'exemples', did you mean 'examples'"),
        (lambda: averages(lab("transfer.average=heads"), "deit_s"), "`transfer.average` averages the maps"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
