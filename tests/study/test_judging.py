"""Claims against measured contrasts."""

import pytest

from ablations import claims as paper
from ablations.benchmark import benchmark
from ablations.rescue import rescue
from atdiag.study.aggregate import corrected
from atdiag.study.claims import Judged
from atdiag.study.judging import judge_claim
from tests.studies import FAILS, fabricated, lab


@pytest.mark.parametrize(
    ("effects", "verdict", "ours"),
    [
        ({"clip_b": -3.0, "beitv2_b": -5.0}, "holds", "-5.0 to -3.0 (2 of 2 clear)"),
        ({"clip_b": -3.0, "beitv2_b": 5.0}, "does not hold", "-3.0 to +5.0 (1 of 2 clear, 1 the other way)"),
        ({"clip_b": -3.0, "beitv2_b": -0.5}, "undecided", "-3.0 to -0.5 (1 of 2 clear)"),
        ({"clip_b": -0.5, "beitv2_b": 0.5}, "undecided", "-0.5 to +0.5 (0 of 2 clear)"),
        ({"clip_b": -3.0}, "holds", "-3.0"),
        ({"deit_b": -3.0}, "not testable here", ""),
    ],
)
def test_a_claim_is_judged_by_the_intervals_of_its_families(effects, verdict, ours):
    reports = [
        fabricated(benchmark(lab(), name, "copy,distill"), [effect, 99.0]) for name, effect in effects.items()
    ] + [fabricated(benchmark(lab(), "dinov2_s", "copy,distill"), [40.0, 99.0])]
    found = judge_claim(FAILS, reports)
    assert (found.verdict, found.ours) == (verdict, ours)
    tested = [effect for name, effect in effects.items() if name in ("clip_b", "beitv2_b")]
    if tested:
        assert (found.low, found.high) == (min(tested) - 1, max(tested) + 1)
    missing = [f for f in ("clip", "beitv2") if f"{f}_b" not in effects]
    assert found.note == (f"not tested: {', '.join(missing)}" if missing else "")


def test_a_claimed_effect_does_not_hold_if_equivalence_is_shown():
    reports = [fabricated(benchmark(lab(), "clip_b", "copy"), [-0.1], half=0.3)]
    assert judge_claim(FAILS, corrected(reports)).verdict == "undecided"
    assert judge_claim(FAILS, corrected(reports, equivalence=0.5)).verdict == "does not hold"


def test_a_rescue_needs_a_failure():
    claim = next(one for one in paper.of("rescue") if one.name == "native components rescue")

    def judged(standard: float) -> Judged:
        study = rescue(lab(), "clip_b", "copy")
        effects = [standard if arm.name == "standard + copy" else 9.0 for arm in study.arms[1:]]
        return judge_claim(claim, [fabricated(study, effects)])

    assert judged(-3.0).verdict == "holds"
    for spared in (judged(24.0), judged(-0.5)):
        assert (spared.verdict, spared.note) == ("not testable here", "no failure to reverse: clip_b (mini)")


def test_one_seed_decides_no_claim():
    reports = [fabricated(benchmark(lab(), "clip_b", "copy"), [-30.0], seeds=1)]
    assert judge_claim(FAILS, reports).verdict == "undecided"
