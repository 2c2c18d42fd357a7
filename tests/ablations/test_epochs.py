"""The epochs ablation: training lengths."""

import pytest

from ablations.benchmark import benchmark
from ablations.epochs import epochs
from atdiag.core.errors import UserError
from tests.studies import lab


def test_each_training_length_has_its_own_runs_and_baseline():
    series = epochs(lab())
    assert [study.options["epochs"] for study in series.studies] == ["2", "4", "8"]
    for study in series.studies:
        length = int(study.options["epochs"])
        assert {spec.recipe.epochs for arm in study.arms for spec in arm.specs} == {length}
        assert study.label == f"dinov2_s (mini), {length} epochs"
    usual = benchmark(lab(), "dinov2_s", "copy")
    assert {spec.id for arm in series.studies[1].arms for spec in arm.specs} <= {spec.id for spec in usual.specs}
    short, long = (study.arms[1].specs[0].model_dump() for study in series.studies[:2])
    assert {key for key in short if short[key] != long[key]} == {"recipe"}
    for wrong in ("2,four", "0", "1.5", "-2"):
        with pytest.raises(UserError, match="is not a number of epochs: write it as '2,4,8'"):
            epochs(lab(), epochs=wrong)
    # lengths are multiples of the user's own
    assert [s.options["epochs"] for s in epochs(lab("recipe.epochs=6")).studies] == ["3", "6", "12"]
