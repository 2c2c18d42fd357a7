"""The data sets ablation: each data set has its own baseline."""

import pytest

from ablations.datasets import datasets
from atdiag.core.errors import UserError
from tests.studies import lab


def test_datasets_have_their_own_baselines():
    series = datasets(lab())
    assert [{spec.data.name for spec in study.specs} for study in series.studies] == [{"digits"}, {"larger"}]
    assert series.studies[1].reference is None  # its head is for the other task
    with pytest.raises(UserError, match="did you mean 'larger'"):
        datasets(lab(), data="digits,largr")
