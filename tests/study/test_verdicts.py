"""Estimates in words."""

import pytest

from atdiag.study.verdicts import verb_phrase
from tests.studies import estimate


@pytest.mark.parametrize(
    ("value", "half", "seeds", "says"),
    [
        (3.0, 1.0, 3, "helps (+3.0 points [+2.0, +4.0], 3 seeds)"),
        (-3.0, 1.0, 3, "hurts (-3.0 points [-4.0, -2.0], 3 seeds)"),
        (0.5, 1.0, 3, "can't be told from noise (+0.5 points [-0.5, +1.5], 3 seeds)"),
        (1.0, 1.0, 3, "can't be told from noise (+1.0 points [+0.0, +2.0], 3 seeds)"),
        (30.0, 1.0, 1, "is undecided with one seed (+30.0 points [+29.0, +31.0], images only)"),
        (30.0, 1.0, 2, "is undecided with two seeds (+30.0 points [+29.0, +31.0])"),
    ],
)
def test_an_estimate_in_words(value, half, seeds, says):
    assert verb_phrase(estimate(value, half, seeds), "helps", "hurts") == says
