"""The images of one split: what every data set gives, and arrays in memory as one form of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atdiag.data.decoding import to_picture


class Split(Protocol):
    """The images of one split, whatever they are made of.

    ``labels`` and ``clusters``: int64 [n]. Images of one cluster are not independent of each other (scenes made of the
    same source digit); where nothing is known to be dependent, every image is a cluster of its own.
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
        """One image as it is stored, for augmentation."""

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images as a test sees them, uint8 [b, C, S, S]."""

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images from ``start`` up to ``stop`` as a test sees them, uint8 [b, C, S, S]."""


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
        """One image."""
        return to_picture(self.pixels[index])

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images, uint8 [b, C, S, S]."""
        return self.pixels[samples]

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images from ``start`` up to ``stop``, uint8 [b, C, S, S]."""
        return self.pixels[start:stop]
