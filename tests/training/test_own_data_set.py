"""A user's own embedded data set: one object in one file, and everything trains and measures on it."""

import math

import numpy as np
import pytest
from scipy import stats

from atdiag.core import randomness
from atdiag.core.spec import Data, Network, Recipe
from atdiag.data import sources
from atdiag.data.embedded import EmbeddedSet
from atdiag.data.splits import Images
from atdiag.stats.contrasts import Outcomes, estimate
from atdiag.study.aggregate import answered
from atdiag.study.protocol import Arm

PATTERNS, SIDE = 12, 8


def stripes(periods, phases, labels, draw):
    """Make vertical (0) or horizontal (1) stripes in noise, uint8 [n, 1, 8, 8]."""
    wave = np.sin(2 * np.pi * (np.arange(SIDE) / periods[:, None] + phases[:, None]))  # [n, 8]
    upright = np.broadcast_to(wave[:, None, :], (len(wave), SIDE, SIDE))
    images = np.where(labels[:, None, None] == 0, upright, upright.swapaxes(1, 2))
    noisy = 128 + 80 * images + draw.normal(0, 20, images.shape)
    return noisy.clip(0, 255).astype(np.uint8)[:, None]


def make_train(data, seed):
    draw = randomness.generator(seed, "stripes/train", data.train)
    labels = draw.integers(0, 2, data.train)
    pixels = stripes(draw.uniform(3, 6, data.train), draw.random(data.train), labels, draw)
    return Images(pixels, labels, np.arange(data.train))


def make_test(data):
    draw = randomness.generator(0, "stripes/test", data.test_per_source)
    clusters = np.repeat(np.arange(PATTERNS), data.test_per_source)
    periods, phases = draw.uniform(3, 6, PATTERNS), draw.random(PATTERNS)
    labels = np.arange(PATTERNS) % 2
    pixels = stripes(periods[clusters], phases[clusters], labels[clusters], draw)
    return Images(pixels, labels[clusters], clusters)


STRIPES = EmbeddedSet(
    name="stripes",
    title="stripes: upright or lying",
    classes=2,
    image_size=SIDE,
    make_train=make_train,
    make_test=make_test,
    sources=PATTERNS,
    cluster="pattern",
)
DATA = Data(name="stripes", train=256, test_per_source=5)
NETWORK = Network(image_size=SIDE, patch_size=2, channels=1, width=16, depth=1, heads=2, classes=2)
RECIPE = Recipe(epochs=8, batch_size=16, lr=3e-3, warmup_epochs=0.5)


@pytest.fixture
def _registered():
    sources.register(STRIPES)
    yield
    del sources.REGISTERED["stripes"]


@pytest.mark.usefixtures("_registered")
def test_a_student_is_trained_on_it_and_its_clusters_are_respected(bench):
    short = RECIPE.model_copy(update={"epochs": 1, "lr": 1e-7})
    specs, untrained = ([bench.spec(seed, recipe, NETWORK, DATA) for seed in range(3)] for recipe in (RECIPE, short))
    status = bench.train(*specs, *untrained)
    assert set(status.values()) == {"finished"}
    arms = {"trained": Arm("trained", tuple(specs)), "untrained": Arm("untrained", tuple(untrained))}
    said = {name: answered(arm, bench.store).outcomes for name, arm in arms.items()}
    assert np.array_equal(said["trained"].clusters, np.repeat(np.arange(PATTERNS), 5))

    # The two classes are learnt, far above chance.
    assert all(right.mean() > 0.8 for right in said["trained"].correct.values())

    # One seed's interval is Student's t over the 12 patterns, not over the 60 images.
    seed = 0, 0
    one = {name: Outcomes({seed: found.correct[seed]}, found.clusters) for name, found in said.items()}
    found = estimate(one, {"trained": 1, "untrained": -1})
    assert (found.images, found.clusters) == (60, PATTERNS)
    scores = {name: 100 * arm.correct[seed].reshape(PATTERNS, 5).mean(axis=1) for name, arm in one.items()}
    by_pattern = scores["trained"] - scores["untrained"]
    assert found.value == pytest.approx(by_pattern.mean())
    half = stats.t.ppf(0.975, PATTERNS - 1) * by_pattern.std(ddof=1) / math.sqrt(PATTERNS)
    assert (found.high - found.low) / 2 == pytest.approx(half)
    assert estimate(said, {"trained": 1, "untrained": -1}).clusters == PATTERNS


def test_the_registration_ends_with_the_test():
    assert "stripes" not in sources.REGISTERED
