"""The losses ablation: losses and weights of distillation."""

import numpy as np
import pytest

from ablations.benchmark import benchmark
from ablations.losses import losses, slope
from atdiag.core.errors import UserError
from atdiag.study.protocol import BASELINE
from tests.studies import arms, differences, lab


def test_arms_differ_only_in_loss_and_weight():
    (study,) = losses(lab(), "dinov2_s", "ce,jsd", "0.3,3").studies
    assert list(arms(study)) == [BASELINE, "ce x0.3", "ce x3", "jsd x0.3", "jsd x3"]
    assert differences(study, "ce x0.3", "ce x3") == {"transfer.weight"}
    assert differences(study, "ce x3", "jsd x3") == {"transfer.loss"}
    # the profile's usual distillation is one of them
    usual = benchmark(lab(), "dinov2_s", "distill").arms[1]
    assert next(arm for arm in study.arms if arm.name == "ce x3").specs == usual.specs
    for wrong in ("0", "-1", "x", "nan", "inf"):
        with pytest.raises(UserError, match="is not a positive number"):
            losses(lab(), weights=wrong)
    with pytest.raises(UserError, match="`losses` 'jds', did you mean 'jsd'"):
        losses(lab(), losses="jds")


def test_the_slope_over_the_weight_is_the_least_squares_slope():
    factors, accuracy = [0.3, 1.0, 30.0], np.array([50.0, 53.0, 51.0])
    weights = slope("ce", factors)
    assert sum(weights.values()) == pytest.approx(0)
    found = sum(w * a for w, a in zip(weights.values(), accuracy, strict=True))
    assert found == pytest.approx(np.polyfit(np.log10(factors), accuracy, 1)[0])
