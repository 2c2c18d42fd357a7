"""Images for analysis: a selection of a data set's images, files, or a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import endings, sources
from atdiag.data.decoding import BrokenImageError, View, decode, to_array
from atdiag.data.splits import Images, Split
from atdiag.networks.weights import classes
from atdiag.networks.weights.classes import HeadClasses, HeadRows


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images. pixels: [b, C, S, S] in [0, 1]; index: positions [b] in the set; labels: [b], or None."""

    pixels: Tensor
    index: NDArray[np.int64]
    labels: NDArray[np.int64] | None


@dataclass
class ImageSet:
    """An ordered set of images, read batch by batch; an unreadable image is an error, or ``skipped`` with ``skip_bad``.

    names: one for each image (a path, or ``digits 17``); labels and clusters: int64 [n], or None if unknown.
    """

    names: tuple[str, ...]
    source: _Source
    labels: NDArray[np.int64] | None = None
    clusters: NDArray[np.int64] | None = None
    data: Data | None = None
    """The data set that the images belong to, if any."""
    skip_bad: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why the image can't be read, for those encountered so far."""
    on_progress: Callable[[int], None] | None = field(default=None, repr=False)
    """Callback (done), called after each batch with the number of images processed."""

    def head_rows(self, head: HeadClasses) -> HeadRows:
        """Return the rows of a head that belong to the data set's classes, in the order of its labels.

        For images outside a data set, labels are themselves rows of the head.
        """
        if self.labels is None:
            return HeadRows(None, "the classes of these images are not known")
        if self.data is None:
            return HeadRows(tuple(range(head.rows)), "the labels as given")
        return classes.match(head, self.data)

    def __len__(self) -> int:
        return len(self.names)

    def reordered(self, order: NDArray[np.int64]) -> ImageSet:
        """Return the same images in another order; skipped images are recorded in this set, too."""
        labels, clusters = (None if x is None else x[order] for x in (self.labels, self.clusters))
        called = tuple(self.names[i] for i in order)
        return ImageSet(
            called,
            _Reordered(self.source, order),
            labels,
            clusters,
            self.data,
            self.skip_bad,
            self.skipped,
            self.on_progress,
        )

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[ImageBatch]:
        """Yield the images in batches of at most ``size``.

        Raises UserError naming an unreadable image, unless ``skip_bad``; also if no image is readable.
        """
        seen = 0
        for start in range(0, len(self), size):
            arrays, kept = [], []
            for index in range(start, min(start + size, len(self))):
                try:
                    arrays.append(self.source.read(index))
                    kept.append(index)
                except BrokenImageError as fault:
                    why = str(fault)
                    if not self.skip_bad:
                        raise UserError(why, "`skip_bad` leaves such images out and counts them") from None
                    self.skipped[self.names[index]] = why
            if not kept:
                continue
            seen += len(kept)
            places = np.array(kept, np.int64)
            pixels = torch.from_numpy(np.stack(arrays)).to(device).float().div_(255)
            yield ImageBatch(pixels, places, None if self.labels is None else self.labels[places])
            if self.on_progress is not None:
                self.on_progress(min(start + size, len(self)))
        if not seen:
            raise UserError(f"none of the {len(self)} images can be read")


class _Source(Protocol):
    def read(self, index: int) -> NDArray[np.uint8]:
        """Read an image, uint8 [C, S, S]. Raises BrokenImageError."""


@dataclass(frozen=True)
class _Reordered:
    """The images of another source, reordered."""

    source: _Source
    order: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Read an image, uint8 [C, S, S]."""
        return self.source.read(int(self.order[index]))


@dataclass(frozen=True)
class _Rows:
    """A subset of a split's images."""

    split: Split
    rows: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Read an image, uint8 [C, S, S]."""
        pixels: NDArray[np.uint8] = self.split.take(self.rows[index : index + 1])[0]
        return pixels


@dataclass(frozen=True)
class _Files:
    """Image files: the shorter side is resized to the network's image size (bicubic), then the centre is cropped."""

    paths: tuple[Path, ...]
    size: int
    channels: int

    def read(self, index: int) -> NDArray[np.uint8]:
        """Read an image, uint8 [C, S, S]. Raises BrokenImageError for a file that is not a readable image."""
        picture = decode(self.paths[index])
        return to_array(View(self.size, 1.0)(picture if self.channels == 3 else picture.convert("L")))


def choose(
    wanted: int | str | Path | Sequence[str | Path], data: Data | None, network: Network, skip_bad: bool = False
) -> ImageSet:
    """Return the selected images, at a network's channels and image size.

    ====================  =============================================================================================
    ``64``                this many test images of the data set, spread evenly over it (files are often sorted by
                          class); 0: all of them
    ``3,17,40-43``        the test images with these indices (a single one: ``17,``)
    files, a folder       the files; all images in a folder and its subfolders, sorted by name. Without labels
    ====================  =============================================================================================

    Raises UserError for any other selection, and for images that do not exist.
    """
    meant = named(wanted)
    if isinstance(meant, int):
        return _of_test_split(data, network, meant, None)
    if isinstance(meant, list):
        return _of_test_split(data, network, None, meant)
    source = _Files(meant, network.image_size, network.channels)
    return ImageSet(tuple(map(str, meant)), source, skip_bad=skip_bad)


def named(wanted: int | str | Path | Sequence[str | Path]) -> int | list[int] | tuple[Path, ...]:
    """Parse a selection for :func:`choose` without opening any data set: a number, indices, or files.

    Raises UserError for any other selection, and for files that do not exist.
    """
    parts = [wanted] if isinstance(wanted, int | str | Path) else list(wanted)
    if not parts:
        raise UserError("no images are named", "give a number, a folder, files or indices")
    texts = [str(part).strip() for part in parts]
    if len(parts) == 1 and re.fullmatch(r"\d+", texts[0]):
        return int(texts[0])
    numbers = [bool(_INDICES.fullmatch(text)) and not Path(text).exists() for text in texts]
    if len(parts) == 1 and _INDICES.fullmatch(texts[0]):
        return _indices(texts[0])
    if all(numbers):
        raise UserError("`images` has several lists of indices", f"give them in one: `images` {','.join(texts)}")
    if any(numbers):
        index = texts[numbers.index(True)]
        raise UserError(f"`images` {index} is an index, and files are named too", "give indices alone, or files alone")
    return tuple(path for part in parts for path in _paths(Path(str(part)).expanduser()))


_LISTED = endings.READ + endings.UNREAD
"""Endings of the images in a folder, including formats that can't be read, which are then named as errors."""

_INDICES = re.compile(r"[\d\s,-]+")


def of_split(data: Data, split: Split, rows: NDArray[np.int64], kind: str = "", skip_bad: bool = False) -> ImageSet:
    """Return the images of a data set's split with these indices; ``kind`` follows the data set in their names."""
    names = tuple(f"{data.name}{kind} {row}" for row in rows)
    return ImageSet(names, _Rows(split, rows), split.labels[rows], split.clusters[rows], data, skip_bad)


def spread(count: int, total: int) -> NDArray[np.int64]:
    """Return ``count`` of ``total`` indices, evenly spaced."""
    return np.arange(count, dtype=np.int64) * total // count


def check_seen(data: Data, network: Network, hint: str) -> None:
    """Raise UserError unless a data set's images are those that a network sees."""
    channels, size = sources.find(data).shape(data)
    if (channels, size) != (network.channels, network.image_size):
        raise UserError(
            f"{data.name} has images of {size} x {size} x {channels}, and the network sees "
            f"{network.image_size} x {network.image_size} x {network.channels}",
            hint,
        )


def from_arrays(pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> ImageSet:
    """Wrap arrays uint8 [n, C, S, S] of unnormalised images, and optionally their classes [n].

    Raises UserError for another dtype or shape.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or not len(pixels):
        raise UserError(
            f"images are uint8 [n, channels, S, S], and these are {pixels.dtype} {list(pixels.shape)}",
            "of floats from 0 to 1 give (255 * x).round().astype(np.uint8)",
        )
    known = np.zeros(len(pixels), np.int64) if labels is None else np.asarray(labels, np.int64)
    if known.shape != (len(pixels),):
        raise UserError(f"{len(pixels)} images have labels of shape {list(known.shape)}", "give one for each")
    rows = _Rows(Images(pixels, known, np.arange(len(pixels))), np.arange(len(pixels)))
    return ImageSet(tuple(f"image {i}" for i in range(len(pixels))), rows, None if labels is None else known)


def _of_test_split(data: Data | None, network: Network, count: int | None, rows: list[int] | None) -> ImageSet:
    if data is None:
        raise UserError("no data set is named", "name one with `data`, or give files to `images`")
    data_set = sources.find(data)
    data = data_set.resized(data, network.image_size)  # resized to the network's size if possible
    check_seen(data, network, "choose another data set with `data`, or give files to `images`")
    split = data_set.test_split(data)
    if rows is None:
        count = count or len(split)
        if count > len(split):
            raise UserError(
                f"`images` {count}: {data.name} has only {len(split)} test images", f"give at most {len(split)}"
            )
        chosen = spread(count, len(split))
    else:
        chosen = np.array(rows, np.int64)
        if chosen.max() >= len(split):
            raise UserError(
                f"`images` {chosen.max()} is out of range: {data.name} has test images 0 to {len(split) - 1}"
            )
    return of_split(data, split, chosen)


def _indices(text: str) -> list[int]:
    out: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"`images` {text!r} is not a list of indices", "write it as 3,17,40-43")
        out += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not out:
        raise UserError(f"`images` {text!r} names no image", "write it as 3,17,40-43")
    return out


def _paths(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(_LISTED) and file.is_file())
        if not found:
            raise UserError(f"there are no images in the folder {path}")
        return found
    if not path.exists():
        pieces = [piece.strip() for piece in str(path).split(",")]
        if len(pieces) > 1 and any(_INDICES.fullmatch(piece) for piece in pieces):
            raise UserError(f"`images` {path}: indices and files can't be mixed", "give indices alone, or files alone")
        if len(pieces) > 1:
            raise UserError(
                f"`images` {path}: there is no such file or folder",
                f"give files one by one: `images` {' `images` '.join(pieces)}",
            )
        raise UserError(
            f"`images` {path}: there is no such file or folder", "give a number, a folder, files, or indices as 3,17"
        )
    return [path]
