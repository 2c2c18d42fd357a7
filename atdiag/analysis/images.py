"""The images that a network is looked into with: some of a data set, files, or a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from atdiag.data import datasets
from atdiag.data.datasets import Images
from atdiag.spec import Data, Network
from atdiag.words import UserError

SUFFIXES = frozenset(Image.registered_extensions())


@dataclass(frozen=True)
class Batch:
    """Some images. pixels: [b, C, S, S] in [0, 1]; index: their places [b] among all; labels: [b], or None."""

    pixels: Tensor
    index: NDArray[np.int64]
    labels: NDArray[np.int64] | None


@dataclass
class Pictures:
    """Images in an order, read batch by batch. Those that can't be read are an error, or ``skipped`` with ``skip_bad``.

    names: what each is called (a path, or ``digits 17``); labels and clusters: int64 [n], or None where not known.
    """

    names: tuple[str, ...]
    source: _Source
    labels: NDArray[np.int64] | None = None
    clusters: NDArray[np.int64] | None = None
    data: Data | None = None
    """The data set that they are of."""
    skip_bad: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why it can't be read, of those met so far."""

    def __len__(self) -> int:
        return len(self.names)

    def reordered(self, order: NDArray[np.int64]) -> Pictures:
        """The same images in another order; those that are skipped are noted here too."""
        names = tuple(self.names[i] for i in order)
        labels, clusters = (None if x is None else x[order] for x in (self.labels, self.clusters))
        return Pictures(names, _Reordered(self.source, order), labels, clusters, self.data, self.skip_bad, self.skipped)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """The images in batches of at most ``size``.

        Raises UserError that names an image which can't be read, unless ``skip_bad``; and where none can be.
        """
        seen = 0
        for start in range(0, len(self), size):
            arrays, kept = [], []
            for index in range(start, min(start + size, len(self))):
                try:
                    arrays.append(self.source.read(index))
                    kept.append(index)
                except OSError as fault:
                    why = f"{self.names[index]} can't be read as an image ({fault})"
                    if not self.skip_bad:
                        raise UserError(why, "--skip-bad leaves such images out and counts them") from None
                    self.skipped[self.names[index]] = why
            if not kept:
                continue
            seen += len(kept)
            places = np.array(kept, np.int64)
            pixels = torch.from_numpy(np.stack(arrays)).to(device).float().div_(255)
            yield Batch(pixels, places, None if self.labels is None else self.labels[places])
        if not seen:
            raise UserError(f"none of the {len(self)} images can be read")


class _Source(Protocol):
    def read(self, index: int) -> NDArray[np.uint8]:
        """An image, uint8 [C, S, S]. Raises OSError where it can't be read."""


@dataclass(frozen=True)
class _Reordered:
    """Another's images in another order."""

    source: _Source
    order: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """uint8 [C, S, S]."""
        return self.source.read(int(self.order[index]))


@dataclass(frozen=True)
class _Rows:
    """Some images of a split."""

    split: Images
    rows: NDArray[np.int64]

    def read(self, index: int) -> NDArray[np.uint8]:
        """uint8 [C, S, S]."""
        pixels: NDArray[np.uint8] = self.split.pixels[self.rows[index]]
        return pixels


@dataclass(frozen=True)
class _Files:
    """Files: the shorter side resized to the network's image size (bicubic), the middle cut out."""

    paths: tuple[Path, ...]
    size: int
    channels: int

    def read(self, index: int) -> NDArray[np.uint8]:
        """uint8 [C, S, S]. Raises OSError for a file that is no image."""
        try:
            with Image.open(self.paths[index]) as opened:
                picture = opened.convert("L" if self.channels == 1 else "RGB")
        except OSError as fault:
            raise OSError(fault.strerror or "no image of a known format") from None
        except Exception as fault:  # Pillow's readers raise whatever a broken file leads them to
            raise OSError(f"{type(fault).__name__}: {fault}") from None
        width, height = picture.size
        scale = self.size / min(width, height)
        width, height = max(round(width * scale), self.size), max(round(height * scale), self.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        array = np.asarray(picture.crop((left, top, left + self.size, top + self.size)))
        return array[None] if array.ndim == 2 else np.ascontiguousarray(np.moveaxis(array, -1, 0))


def choose(
    wanted: int | str | Path | Sequence[str | Path], data: Data | None, network: Network, skip_bad: bool = False
) -> Pictures:
    """The images that are meant, for a network's channels and image size.

    ====================  =============================================================================================
    ``64``                so many test images of the data set, spread evenly over it (files of a set are often in the
                          order of their classes); 0: all of them
    ``3,17,40-43``        these test images, by their indices (a single one: ``17,``)
    files, a folder       the files; the images in a folder and in its folders, by name. No labels are known of them
    ====================  =============================================================================================

    Raises UserError for what is none of these, or is not there.
    """
    parts = [wanted] if isinstance(wanted, int | str | Path) else list(wanted)
    if not parts:
        raise UserError("no images are named", "give a number, a folder, files or indices")
    text = str(parts[0]).strip()
    if len(parts) == 1 and re.fullmatch(r"\d+", text):
        return _of_split(data, network, int(text), None)
    if len(parts) == 1 and re.fullmatch(r"[\d\s,-]+", text):
        return _of_split(data, network, None, _indices(text))
    paths: list[Path] = []
    for part in parts:
        paths += _paths(Path(str(part)).expanduser())
    source = _Files(tuple(paths), network.image_size, network.channels)
    return Pictures(tuple(map(str, paths)), source, skip_bad=skip_bad)


def from_arrays(pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None = None) -> Pictures:
    """Images uint8 [n, C, S, S] that are there already."""
    known = np.zeros(len(pixels), np.int64) if labels is None else np.asarray(labels, np.int64)
    rows = _Rows(Images(pixels, known, np.arange(len(pixels))), np.arange(len(pixels)))
    return Pictures(tuple(f"image {i}" for i in range(len(pixels))), rows, None if labels is None else known)


def _of_split(data: Data | None, network: Network, count: int | None, rows: list[int] | None) -> Pictures:
    if data is None:
        raise UserError("nothing says which data set is meant", "give a folder or files to --images")
    try:
        datasets.check(data, network)
    except ValueError as fault:
        if "classes" not in str(fault):  # another head does not keep anyone from looking at attention
            raise UserError(
                str(fault), "choose another data set with --set data.name, or give --images a folder"
            ) from None
    split = datasets.test_split(data)
    if rows is None:
        count = count or len(split)
        if count > len(split):
            raise UserError(f"--images {count}: {data.name} has {len(split)} test images", "give at most so many")
        chosen = np.arange(count, dtype=np.int64) * len(split) // count
    else:
        chosen = np.array(rows, np.int64)
        if chosen.max() >= len(split):
            raise UserError(f"--images {chosen.max()}: {data.name} has test images 0 to {len(split) - 1}")
    names = tuple(f"{data.name} {row}" for row in chosen)
    return Pictures(names, _Rows(split, chosen), split.labels[chosen], split.clusters[chosen], data)


def _indices(text: str) -> list[int]:
    out: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise UserError(f"--images {text!r} is no list of indices", "write it as 3,17,40-43")
        out += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not out:
        raise UserError(f"--images {text!r} names no image", "write it as 3,17,40-43")
    return out


def _paths(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise UserError(f"there are no images in the folder {path}")
        return found
    if not path.exists():
        raise UserError(
            f"--images {path}: there is no such file or folder", "give a number, a folder, files, or indices as 3,17"
        )
    return [path]
