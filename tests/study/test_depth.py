"""Accuracy over depth: intervals as for all other contrasts."""

import numpy as np
import pytest

from atdiag.analysis.probing import Probed
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.study import depth

CLUSTERS = np.repeat(np.arange(20), 3)


def probed(seed, layers=(0, 5), itself=True):
    right = np.random.default_rng(seed).random((2, 60)) < np.array([[0.4], [0.7]])
    correct = {("linear", "both"): right, ("head", ""): ~right}
    return Probed("net", str(seed), layers, 99, correct, {"both": np.array([0.01, 1.0])}, 19, 20, CLUSTERS, right[1])


def test_each_layer_has_an_interval_over_seeds_and_images():
    runs = [probed(1), probed(2)]
    frame = depth.frame({"arm": runs, "alone": [probed(3)]})
    assert len(frame) == 2 * (2 * 2 + 1)
    row = frame[(frame.subject == "arm") & (frame.probe == "linear") & (frame.layer == 5)].iloc[0]
    correct = {i: run.correct["linear", "both"][1] for i, run in enumerate(runs)}
    expected = estimate({"a": Outcomes(correct, CLUSTERS.astype(np.int32))}, {"a": 1})
    assert (row.top1, row.ci_low, row.ci_high) == (expected.value, max(expected.low, 0), min(expected.high, 100))
    assert (row.seeds, row.images, row.clusters, row.train) == (2, 60, 20, 99)
    assert row.interval_covers == "seeds and images" and row.penalty == pytest.approx(1.0)
    alone = frame[(frame.subject == "alone") & (frame.probe == "itself")].iloc[0]
    assert alone.layer == -1 and alone.interval_covers == "images only"
    assert alone.top1 == pytest.approx(100 * probed(3).itself.mean())


def test_intervals_stay_between_0_and_100():
    nearly = probed(1)
    nearly.correct["linear", "both"][:] = True
    nearly.correct["linear", "both"][:, 0] = False
    frame = depth.frame({"net": [nearly]})
    assert (frame.ci_high.max() == 100.0 and frame.ci_low.min() == 0.0) or frame.ci_low.min() > 0


def test_runs_with_different_layers_are_not_one_arm():
    with pytest.raises(ValueError, match="different layers"):
        depth.frame({"arm": [probed(1), probed(2, layers=(0, 6))]})
