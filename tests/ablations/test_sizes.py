"""The sizes ablation: all sizes of a family."""

import pytest

from ablations.sizes import sizes
from atdiag.core.errors import UserError
from tests.studies import lab


def test_sizes_are_the_sizes_of_one_family():
    series = sizes(lab(), "dinov2")
    assert [study.teacher.name for study in series.studies] == ["dinov2_s", "dinov2_b"]
    every = {study.teacher.name for study in sizes(lab()).studies}
    assert every == {"deit_s", "deit_b", "dinov2_s", "dinov2_b"}
    with pytest.raises(UserError, match=r"clip has one size at profile mini \(clip_b\): .* choose from: deit, dinov2"):
        sizes(lab(), "clip")
    with pytest.raises(UserError, match="`family` 'diet', did you mean 'deit'"):
        sizes(lab(), "diet")
