"""What the arms of a study must have in common."""

from dataclasses import replace

import pytest

from ablations.benchmark import benchmark
from atdiag.core.errors import UserError
from atdiag.core.spec import Seed
from atdiag.study.protocol import Series
from tests.studies import lab


def test_a_study_needs_a_baseline_and_another_arm():
    study = benchmark(lab(), "deit_s", "copy")
    with pytest.raises(UserError, match=r"no arm to contrast with a baseline: give arms=\(lab.baseline"):
        Series.join([replace(study, arms=study.arms[1:])])


def test_arms_that_share_no_baseline_are_refused():
    study = benchmark(lab(), "deit_s", "copy")
    other = benchmark(lab("data.name=larger"), "deit_s", "copy")
    with pytest.raises(
        UserError, match=r"'copy' \(on larger\) and 'scratch' \(on digits\) are not measured on the same"
    ):
        replace(study, arms=(study.arms[0], other.arms[1]))
    redrawn = benchmark(lab("data.test_draw=1"), "deit_s", "copy")
    with pytest.raises(UserError, match="are not measured on the same images"):
        replace(study, arms=(study.arms[0], redrawn.arms[1]))
    held = benchmark(lab("data.validation=0.1"), "deit_s", "copy")  # different training images, the same test images
    assert replace(study, arms=(study.arms[0], held.arms[1]))
    assert held.reference == study.reference
    late = replace(
        study.arms[1], specs=tuple(s.model_copy(update={"seed": Seed(data=9, model=9)}) for s in study.arms[1].specs)
    )
    with pytest.raises(UserError, match="have no seed in common"):
        replace(study, arms=(study.arms[0], late))
