"""Signs of trouble, from statistics whose values are made up."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from atdiag.analysis import images, subjects
from atdiag.analysis.statistics import OF_HEADS, Stats
from atdiag.core.spec import Data, Network
from atdiag.data import sources
from atdiag.diagnosis.first_look import nearest_neighbour, signs
from atdiag.hooks.branches import branch_gains
from atdiag.networks.registry.specimens import specimens

NETWORK = Network(image_size=20, patch_size=4, width=32, depth=4, heads=2, classes=10)
MOST = math.log2(NETWORK.tokens)
OPEN = np.full(4, 0.2)
"""Gains of attention branches that are in use."""


def stats(**changed):
    usual = dict.fromkeys(OF_HEADS, 0.0) | {"entropy": 0.6 * MOST, "redundancy": 0.3, "register_share": np.nan}
    heads = {name: np.full((4, 2), value) for name, value in usual.items()}
    for name, (layers, value) in changed.items():
        heads[name][list(layers)] = value
    return Stats("a", "b", NETWORK, (0, 1, 2, 3), 64, heads, {}, 64)


def test_a_healthy_teacher_shows_nothing():
    assert signs(stats(), OPEN) == []


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
    (one,) = signs(stats(**{statistic: ((1, 3), value)}), OPEN)
    assert (one.statistic, one.layers) == (statistic, (1, 3))
    assert one.value == pytest.approx(value / MOST if statistic == "entropy" else value)
    assert text in one.text
    assert one.text.startswith("2 blocks of 4 (1, 3): ")
    assert signs(stats(**{statistic: (range(4), value)}), OPEN)[0].text.startswith("all blocks: ")


def test_a_register_that_takes_all_is_no_sink_beside():
    found = signs(stats(sink=(range(4), 0.8), register_share=(range(4), 0.9)), OPEN)
    assert [one.statistic for one in found] == ["register_share"]


def test_a_shut_branch_is_named_and_an_unknown_gain_is_not():
    (one,) = signs(stats(), np.array([0.2, 0.002, np.nan, 0.004]))
    assert (one.statistic, one.layers) == ("gain", (1, 3))
    assert one.value == pytest.approx(0.003)
    assert one.text == (
        "2 blocks of 4 (1, 3): the attention branch adds 0.30% of the stream's norm, so its maps may be noise"
    )


def test_gains_are_the_branch_over_the_stream_by_hand():
    """Of a miniature with LayerScale, from the modules themselves."""
    data = Data(name="digits", train=64, clutter=6)
    subject = subjects.find("dinov2_s", "mini", data)
    pictures = images.choose(40, data, subject.network)
    pixels = torch.cat([batch.pixels for batch in pictures.batches(40)])
    streams, branches = [], []
    hooks = []
    for block in subject.module.blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, given: streams.append(given[0])))
        hooks.append(block.ls1.register_forward_hook(lambda _, given, out: branches.append(out)))
    with torch.no_grad():
        subject.module(pixels)
    for hook in hooks:
        hook.remove()
    by_hand = [float((b.norm(dim=-1) / s.norm(dim=-1)).mean()) for s, b in zip(streams, branches, strict=True)]
    assert branch_gains(subject, pictures) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.skipif(not specimens()["gated"].file.exists(), reason="the weights of gated are not here")
def test_the_planted_gate_is_seen():
    data = Data(name="digits", train=64, clutter=6)
    subject = subjects.find("gated", "mini", data)
    gains = branch_gains(subject, images.choose(16, data, subject.network))
    assert [*np.flatnonzero(gains > 0.01)] == [5, 11], "the two open blocks"


def test_the_nearest_neighbour_is_scikit_learns():
    data = Data(name="digits", train=150, clutter=6, test_per_source=1)
    source = sources.find(data)
    train, test = source.train_split(data, 0), source.test_split(data)
    rows = images.spread(min(500, len(test)), len(test))
    x, y = (train.pixels.reshape(len(train), -1) / 255.0, train.labels)
    middle = x.mean(0)
    near = KNeighborsClassifier(1, metric="cosine").fit(x - middle, y)
    right = near.predict(test.pixels[rows].reshape(len(rows), -1) / 255.0 - middle) == test.labels[rows]
    found, chance = nearest_neighbour(data)
    assert found == pytest.approx(100 * right.mean(), abs=100 / len(rows))
    assert chance == pytest.approx(100 * np.bincount(test.labels).max() / len(test))
