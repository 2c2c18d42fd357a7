"""Real images: decoding, the test view, and a split as one object."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from atdiag.data.image_folders import Files, Stored


class BrokenImageError(OSError):
    """An image that can't be decoded, named by its path. A run that meets one stops: nothing is skipped silently."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)  # args must match the constructor for unpickling
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"the image {self.path} can't be read: {self.why}"


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are read, whatever a file's suffix. Not all that Pillow supports: for EPS it would run Ghostscript."""


def decode(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an image as RGB at its stored size; EXIF orientation is ignored, as in timm. Raises BrokenImageError.

    content: the file's bytes, if already read.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise BrokenImageError(path, "it is not an image of a known format") from None
    except OSError as fault:
        raise BrokenImageError(path, fault.strerror or str(fault)) from None
    except Exception as fault:  # Pillow's readers raise many types on a broken file
        raise BrokenImageError(path, f"{type(fault).__name__}: {fault}") from None


def load(stored: Stored) -> Image.Image:
    """Decode a stored image, in a file or a tar. Raises BrokenImageError."""
    try:
        content = stored.read()
    except OSError as fault:
        raise BrokenImageError(stored.path, fault.strerror or str(fault)) from None
    return decode(stored.path, content)


@dataclass(frozen=True)
class View:
    """The test view of an image: resize the shorter side to ``size / share`` (bicubic), then crop the centre.

    An image stored as ``size x size`` is used unchanged.
    """

    size: int
    share: float

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the view, ``size x size``."""
        width, height = picture.size
        if width == height == self.size:
            return picture
        short = int(self.size / self.share)
        if width <= height:
            width, height = short, int(short * height / width)
        else:
            width, height = int(short * width / height), short
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return picture.crop((left, top, left + self.size, top + self.size))


def to_array(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a grey or colour picture to uint8 [C, H, W]."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def to_picture(array: NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 [C, H, W] with one or three channels to a picture."""
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1)))


class ImageFolder:
    """A split of real images, each its own cluster.

    decoded: a file with all images decoded at their stored size, uint8 [n, H, W, 3] (see ``cache``); None: decode each
    image on demand.
    """

    channels = 3

    def __init__(self, files: Files, view: View, decoded: Path | None = None) -> None:
        self.files, self.view, self.decoded = files, view, decoded
        self.size = view.size
        self.labels = np.array(files.labels, np.int64)
        self.clusters: NDArray[np.int64] = np.arange(len(files), dtype=np.int64)
        self._stored: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:  # each process opens the decoded file itself
        return {**self.__dict__, "_stored": None}

    def _open(self) -> NDArray[np.uint8] | None:
        if self._stored is None and self.decoded is not None:
            self._stored = np.load(self.decoded, mmap_mode="r", allow_pickle=False)
        return self._stored

    def path(self, index: int) -> Path:
        """Return the path that names an image."""
        return self.files.stored(index).path

    def picture(self, index: int) -> Image.Image:
        """Return an image at its stored size. Raises BrokenImageError."""
        stored = self._open()
        return load(self.files.stored(index)) if stored is None else Image.fromarray(stored[index])

    def take(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return test views of some images, uint8 [b, 3, S, S]. Raises BrokenImageError."""
        stored = self._open()
        if stored is not None and stored.shape[1:3] == (self.size, self.size):
            return np.ascontiguousarray(np.moveaxis(stored[samples], -1, 1))
        out = np.empty((len(samples), 3, self.size, self.size), np.uint8)
        for row, index in enumerate(samples):
            out[row] = to_array(self.view(self.picture(int(index))))
        return out

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return test views of the images in ``[start, stop)``, uint8 [b, 3, S, S]."""
        return self.take(np.arange(start, min(stop, len(self))))
