"""Cluttered digits: the embedded data, made from scikit-learn's 1,797 real handwritten digits (8 x 8, no download).

Two tasks on one canvas, after the cluttered-MNIST task of Mnih et al. 2014 ("Recurrent Models of Visual Attention"):

- ``digits``: one digit, placed at random among fragments of others; the label is the digit (10 classes). A network has
  to find the digit before it can classify it, which is why attention matters here.
- ``larger``: two different digits without overlap among fragments; the label is the larger one's value minus one
  (9 classes: 1 to 9).

The source digits are split into train and test *before* scenes are made, so no handwriting of the test set is ever
seen in training. Test scenes that share a source digit are not independent: each scene carries the cluster (its source
digit, or its pair of source digits; the pairs are disjoint) by which intervals must be computed.

A validation part is made from source digits of the training split, which no training scene then shows, not even as
clutter. ``data.validation`` below 1 is the share of these digits; a number of scenes takes as many digits, but at most
a fifth. They are stratified by class, at least ten are held out and at least ten left, and they are the same for every
data seed; the scenes made from them differ by data seed, as training scenes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atdiag.core import randomness
from atdiag.data import validation as held_back
from atdiag.data.catalogue import CANVAS

DIGIT = 8
"""Side of a source digit in pixels."""

FRAGMENT = 5
"""Side of a fragment of clutter in pixels."""

STEP = 4
"""Digits are placed at multiples of this many pixels, fragments anywhere."""

_TEST_SHARE = 1 / 3
_MOST_VALIDATION = 1 / 5  # share of the training digits if a number of scenes is given
_FEWEST = 10  # digits for training and for validation: one of each class
_SPLIT_SEED = 0  # the split of the source digits is part of the data set's definition, not of a run
_TEST_SEED = 0  # likewise the test scenes: every run is measured on the same images


@dataclass(frozen=True)
class Scenes:
    """Scenes of one split.

    images: uint8 [n, 1, 20, 20]; labels: int64 [n]; clusters: int64 [n], in a test split equal for scenes that share
    source digits; sources: int64 [n, s], the source digits (indices into scikit-learn's set) that determine the label,
    s = 1 or 2.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    clusters: NDArray[np.int64]
    sources: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@cache
def _sources() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return scikit-learn's digits as uint8 [1797, 8, 8] in 0..255, and their labels.

    Read from its file of them, since importing scikit-learn takes seconds in every training process.
    """
    package = util.find_spec("sklearn")
    file = Path((package and package.origin) or "").parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 pixels in 0..16 and the label
        pixels, labels = rows[:, :-1].reshape(-1, DIGIT, DIGIT), rows[:, -1]
    else:  # an installation in an archive, or a scikit-learn that keeps it elsewhere
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, labels = digits.images, digits.target.astype(np.int64)
    return np.round(pixels * (255 / 16)).astype(np.uint8), labels


@cache
def source_split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of source digits for training and test (a third of every class), fixed for all runs."""
    _, labels = _sources()
    order = randomness.generator(_SPLIT_SEED, "digits/split").permutation(len(labels))
    test: list[NDArray[np.int64]] = []
    for digit in range(10):
        members = order[labels[order] == digit]
        test.append(members[: round(len(members) * _TEST_SHARE)])
    held_out = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _paste(
    canvas: NDArray[np.uint8], patches: NDArray[np.uint8], top: NDArray[np.int64], left: NDArray[np.int64]
) -> None:
    """Paste patches [n, p, p] on canvas [n, 20, 20] at (top, left), keeping the brighter pixel."""
    side = patches.shape[-1]
    scene = np.arange(len(canvas))[:, None, None]
    rows = top[:, None, None] + np.arange(side)[None, :, None]
    columns = left[:, None, None] + np.arange(side)[None, None, :]
    canvas[scene, rows, columns] = np.maximum(canvas[scene, rows, columns], patches)


def _clutter(canvas: NDArray[np.uint8], pool: NDArray[np.int64], count: int, draw: np.random.Generator) -> None:
    images, _ = _sources()
    n = len(canvas)
    for _ in range(count):
        source = draw.choice(pool, n)
        cut = draw.integers(0, DIGIT - FRAGMENT + 1, (2, n, 1, 1))
        inside = np.arange(FRAGMENT)
        patches = images[source[:, None, None], cut[0] + inside[None, :, None], cut[1] + inside[None, None, :]]
        top, left = draw.integers(0, CANVAS - FRAGMENT + 1, (2, n))
        _paste(canvas, patches, top, left)


def _make(sources: NDArray[np.int64], pool: NDArray[np.int64], clutter: int, draw: np.random.Generator) -> Scenes:
    """Generate scenes of the given source digits [n] or pairs [n, 2], with clutter cut from ``pool``."""
    images, labels = _sources()
    sources = sources.reshape(len(sources), -1)
    canvas = np.zeros((len(sources), CANVAS, CANVAS), np.uint8)
    _clutter(canvas, pool, clutter, draw)
    free = CANVAS - DIGIT
    if sources.shape[1] == 1:
        top, left = STEP * draw.integers(0, free // STEP + 1, (2, len(sources)))
        _paste(canvas, images[sources[:, 0]], top, left)
        label = labels[sources[:, 0]]
    else:
        # Separate the two digits along one random axis; place them anywhere along the other.
        gap = free - DIGIT  # what is left along the axis once both are placed side by side
        first = draw.integers(0, gap + 1, len(sources))
        second = first + DIGIT + np.floor(draw.random(len(sources)) * (gap - first + 1)).astype(np.int64)
        across = draw.integers(0, free + 1, (2, len(sources)))
        swap, turn = draw.random((2, len(sources))) < 0.5
        for i, along in enumerate((np.where(swap, second, first), np.where(swap, first, second))):
            top, left = np.where(turn, along, across[i]), np.where(turn, across[i], along)
            _paste(canvas, images[sources[:, i]], top, left)
        label = labels[sources].max(axis=1) - 1
    clusters = np.unique(sources[:, 0], return_inverse=True)[1].astype(np.int64)
    return Scenes(canvas[:, None], label, clusters, sources)


def _pairs(pool: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
    """Return disjoint random pairs [m, 2] of source digits, without the tenth or so that have equal labels."""
    _, labels = _sources()
    pairs = draw.permutation(pool)[: len(pool) // 2 * 2].reshape(-1, 2)
    differ: NDArray[np.bool_] = labels[pairs[:, 0]] != labels[pairs[:, 1]]
    return pairs[differ]


@cache
def training_split(validation: float | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of source digits for training and validation, fixed for all runs."""
    pool, _ = source_split()
    if validation is None:
        return pool, pool[:0]
    most = len(pool) if validation < 1 else round(_MOST_VALIDATION * len(pool))
    count = int(np.clip(held_back.size(validation, len(pool)), _FEWEST, min(most, len(pool) - _FEWEST)))
    _, labels = _sources()
    order = randomness.generator(_SPLIT_SEED, "digits/validation").permutation(len(pool))
    held = np.sort(pool[held_back.stratified(labels[pool].tolist(), order.tolist(), count)])
    return np.setdiff1d(pool, held), held


def train_scenes(task: str, count: int, seed: int, clutter: int, validation: float | None = None) -> Scenes:
    """Generate ``count`` training scenes of ``task`` with ``clutter`` fragments each, as a pure function."""
    pool, _ = training_split(validation)
    return _drawn(task, "train", pool, count, seed, clutter)


def validation_scenes(task: str, count: int, seed: int, clutter: int, validation: float) -> Scenes:
    """Generate ``count`` scenes like the training ones, from the source digits held out for validation."""
    _, pool = training_split(validation)
    return _drawn(task, "validation", pool, count, seed, clutter)


def _drawn(task: str, part: str, pool: NDArray[np.int64], count: int, seed: int, clutter: int) -> Scenes:
    draw = randomness.generator(seed, f"digits/{task}/{part}", count, clutter)
    if task == "digits":
        sources = draw.choice(pool, count)
    else:
        _, labels = _sources()
        sources = draw.choice(pool, (count, 2))
        while len(same := np.flatnonzero(labels[sources[:, 0]] == labels[sources[:, 1]])):
            sources[same, 1] = draw.choice(pool, len(same))
    return _make(sources, pool, clutter, draw)


def test_scenes(task: str, per_source: int, clutter: int, test_draw: int = 0) -> Scenes:
    """Generate the test scenes: every held-out digit (or pair) in ``per_source`` scenes, the same for every run.

    test_draw: 0, or the number of another draw from the same digits.
    """
    which = (test_draw,) if test_draw else ()  # draw 0 existed before other draws did
    draw = randomness.generator(_TEST_SEED, f"digits/{task}/test", per_source, clutter, *which)
    _, pool = source_split()
    sources = pool if task == "digits" else _pairs(pool, draw)
    return _make(np.repeat(sources, per_source, axis=0), pool, clutter, draw)
