"""The ood ablation: test sets out of distribution."""

import pytest

from ablations.benchmark import benchmark
from ablations.ood import ood
from atdiag.core.errors import UserError
from tests.studies import lab


def test_ood_adds_no_training_runs():
    series = ood(lab(), "dinov2_s", "clean,contrast:2", "copy")
    assert [study.test_set for study in series.studies] == [None, "contrast:2"]
    assert {spec.id for spec in series.specs} == {spec.id for spec in benchmark(lab(), "dinov2_s", "copy").specs}
    with pytest.raises(UserError, match="unknown test set 'contrst', did you mean 'contrast'"):
        ood(lab(), on="contrst")
