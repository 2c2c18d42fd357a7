"""Signs of trouble, from statistics whose values are made up."""

import math

import numpy as np
import pytest

from atdiag.analysis.statistics import OF_HEADS, Stats
from atdiag.core.spec import Network
from atdiag.diagnosis.first_look import signs

NETWORK = Network(image_size=20, patch_size=4, width=32, depth=4, heads=2, classes=10)
MOST = math.log2(NETWORK.tokens)


def stats(**changed):
    usual = dict.fromkeys(OF_HEADS, 0.0) | {"entropy": 0.6 * MOST, "redundancy": 0.3, "register_share": np.nan}
    heads = {name: np.full((4, 2), value) for name, value in usual.items()}
    for name, (layers, value) in changed.items():
        heads[name][list(layers)] = value
    return Stats("a", "b", NETWORK, (0, 1, 2, 3), 64, heads, {}, 64)


def test_a_healthy_teacher_shows_nothing():
    assert signs(stats()) == []


@pytest.mark.parametrize(
    ("statistic", "value", "text"),
    [
        ("register_share", 0.8, "80% of the attention goes to registers"),
        ("sink", 0.7, "one token takes 70% of the attention"),
        ("entropy", MOST, "nearly uniform"),
        ("entropy", 0.01 * MOST, "nearly one-hot"),
        ("redundancy", 0.001, "nearly alike"),
    ],
)
def test_each_sign_names_its_blocks(statistic, value, text):
    (one,) = signs(stats(**{statistic: ((1, 3), value)}))
    assert (one.statistic, one.layers) == (statistic, (1, 3))
    assert one.value == pytest.approx(value / MOST if statistic == "entropy" else value)
    assert text in one.text
    assert one.text.startswith("2 blocks of 4 (1, 3): ")
    assert signs(stats(**{statistic: (range(4), value)}))[0].text.startswith("all blocks: ")


def test_a_register_that_takes_all_is_no_sink_beside():
    found = signs(stats(sink=(range(4), 0.8), register_share=(range(4), 0.9)))
    assert [one.statistic for one in found] == ["register_share"]
