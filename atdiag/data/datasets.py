"""Data sets by name, as arrays that fit in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atdiag.data import digits
from atdiag.data.names import NAMES
from atdiag.spec import Data, Network
from atdiag.words import UserError, suggest


@dataclass(frozen=True)
class Images:
    """One split. pixels: uint8 [n, channels, S, S]; labels: int64 [n]; clusters: int64 [n].

    Images of one cluster are not independent of each other (scenes made of the same source digit); where nothing is
    known to be dependent, every image is a cluster of its own.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


def _known(name: str) -> str:
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}{suggest(name, NAMES)}", f"known: {', '.join(NAMES)}")
    return name


def check(data: Data, network: Network) -> None:
    """Raise UserError for a data set that is not here, ValueError for a network that does not fit it."""
    classes = NAMES[_known(data.name)]
    for what, have, need in (
        ("classes", network.classes, classes),
        ("channels", network.channels, 1),
        ("image_size", network.image_size, digits.CANVAS),
    ):
        if have != need:
            raise ValueError(f"the network has {what} {have}, the data set {data.name} {need}")


def train_split(data: Data, seed: int) -> Images:
    """The training images of a data set for a data seed."""
    scenes = digits.train_scenes(_known(data.name), data.train, seed, data.clutter)
    return Images(scenes.images, scenes.labels, scenes.clusters)


def test_split(data: Data) -> Images:
    """The test images of a data set, the same for every run."""
    scenes = digits.test_scenes(_known(data.name), data.test_per_source, data.clutter)
    return Images(scenes.images, scenes.labels, scenes.clusters)
