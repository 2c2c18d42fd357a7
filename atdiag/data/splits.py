"""The images of one split: the interface, and its implementation by arrays in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atdiag.data.decoding import to_picture


class Split(Protocol):
    """The images of one split, from any source.

    ``labels`` and ``clusters``: int64 [n]. Images of one cluster are not independent of each other (scenes made of the
    same source digit); where no dependence is known, every image is its own cluster.
    """

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image."""

    @property
    def clusters(self) -> NDArray[np.int64]:
        """Cluster of each image."""

    @property
    def channels(self) -> int:
        """1 or 3."""

    @property
    def size(self) -> int:
        """Side of the images that networks see."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image:
        """Return one image as stored, for augmentation."""

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images in the test view, uint8 [b, C, S, S]."""

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images in ``[start, stop)`` in the test view, uint8 [b, C, S, S]."""


@dataclass(frozen=True)
class Images:
    """A split that fits in memory. pixels: uint8 [n, channels, S, S]; labels: int64 [n]; clusters: int64 [n]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """1 or 3."""
        return int(self.pixels.shape[1])

    @property
    def size(self) -> int:
        """Side of an image."""
        return int(self.pixels.shape[-1])

    def picture(self, index: int) -> Image.Image:
        """Return one image."""
        return to_picture(self.pixels[index])

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images, uint8 [b, C, S, S]."""
        return self.pixels[samples]

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images in ``[start, stop)``, uint8 [b, C, S, S]."""
        return self.pixels[start:stop]
