"""The gains of several methods."""

import pytest

from ablations import claims as paper
from ablations import gains
from ablations.reinit import reinit
from atdiag.core.errors import UserError
from atdiag.core.spec import Transfer
from tests.studies import lab


def test_gains_plans_the_requested_methods():
    with pytest.raises(UserError, match="`methods` 'finetun', did you mean 'finetune'"):
        gains.study(lab(), "benchmark", "clip_b", ["finetun"])
    assert Transfer() == gains.study(lab(), "benchmark", "clip_b", ["finetune"]).arms[1].specs[0].transfer
    assert reinit(lab()).claims == paper.of("reinit")
