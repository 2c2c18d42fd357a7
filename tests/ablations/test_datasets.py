"""The data sets ablation: each data set has its own baseline."""

import pytest

from ablations.datasets import datasets
from atdiag.core.errors import UserError
from tests.studies import lab


def test_datasets_have_their_own_baselines():
    series = datasets(lab())
    assert [{spec.data.name for spec in study.specs} for study in series.studies] == [{"digits"}, {"larger"}]
    assert [study.reference.probed for study in series.studies] == [False, True]  # its head is for digits
    with pytest.raises(UserError, match="did you mean 'larger'"):
        datasets(lab(), data="digits,largr")
