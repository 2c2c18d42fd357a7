"""Data sets by name: embedded scenes as arrays, real images as lists of files, both with one face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from atdiag.core import resources
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.data import cache, image_folders, scenes
from atdiag.data.catalogue import FACTS, crop_share
from atdiag.data.decoding import ImageFolder, View, to_picture
from atdiag.data.image_folders import SPLITS, Files, SplitName
from atdiag.data.names import classes, is_real, known, test_images


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
        """Some images as a test sees them, uint8 [b, C, S, S]."""

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The images from ``start`` to before ``stop`` as a test sees them, uint8 [b, C, S, S]."""


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
        """Some images, uint8 [b, C, S, S]."""
        return self.pixels[samples]

    def batch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The images from ``start`` to before ``stop``, uint8 [b, C, S, S]."""
        return self.pixels[start:stop]


def check(data: Data, network: Network) -> None:
    """Look at a data set, in seconds and without decoding an image, before anything is trained on it.

    Raises UserError for a data set that is not here, or whose folder is not what its name or the spec says (layout,
    classes, empty classes, numbers of images, fingerprint); ValueError for a network that does not fit it.
    """
    number = classes(data)
    channels, size = (3, data.image_size) if is_real(data.name) else (1, scenes.CANVAS)
    if size is None:
        raise ValueError(f"the data set {data.name} holds real images: its spec needs an image_size")
    for what, have, need in (
        ("classes", network.classes, number),
        ("channels", network.channels, channels),
        ("image_size", network.image_size, size),
    ):
        if have != need:
            raise ValueError(f"the network has {what} {have}, the data set {data.name} {need}")
    if is_real(data.name):
        _check_folder(data)
    else:
        count = data.train + test_images(data)
        resources.room(count * scenes.CANVAS**2, f"{count:,} scenes", "make data.train or data.test_per_source smaller")


def check_files(name: str) -> dict[SplitName, Files]:
    """The images of both splits of a data set. Raises UserError where the folder is not what the name says."""
    files = {split: image_folders.read(name, split) for split in SPLITS}
    train, test = files["train"], files["test"]
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"training and test images in {train.root} have different classes: {', '.join(odd[:5])}")
    if facts := FACTS.get(name):
        for split, have, need in (("training", len(train), facts.train), ("test", len(test), facts.test)):
            if have != need:
                raise UserError(
                    f"{train.root} has {have:,} {split} images, {name} ({facts.title}) {need:,}",
                    f"complete it, or use it as a data set of your own: folder:{train.root}",
                )
    return files


def _check_folder(data: Data) -> None:
    files = check_files(data.name)
    train, test = files["train"], files["test"]
    for part, wanted in ((train, data.per_class), (test, data.test_per_class)):
        if wanted and (fewest := min(part.counts)) < wanted:
            name = part.classes[part.counts.index(fewest)]
            raise UserError(
                f"the class {name} in {part.root} has {fewest} {part.split} images, and the spec takes {wanted}"
            )
    _check_count(data, len(train), len(train.classes))
    if data.fingerprint is None:
        if data.name not in FACTS:
            raise UserError(f"{data.name} needs a fingerprint of its files in its spec", "names.complete gives it")
    elif (now := image_folders.fingerprint_of([train, test])) != data.fingerprint:
        raise UserError(
            f"the files in {train.root} are not those that the spec was made with "
            f"(fingerprint {now[:12]}, not {data.fingerprint[:12]})"
        )


def _check_count(data: Data, have: int, number: int) -> None:
    need = data.per_class * number if data.per_class else data.train
    if data.train > need:
        raise UserError(
            f"data.train={data.train}, but per_class={data.per_class} of {number} classes are {need} images"
        )
    if need > have:
        raise UserError(f"data.train={data.train}, but {data.name} has {have} training images")


def train_split(data: Data, seed: int) -> Images | ImageFolder:
    """The training images of a data set: of scenes for a data seed, of real images the same ones for every seed."""
    if is_real(data.name):
        return _folder(data, image_folders.read(data.name, "train").subset(data.per_class).subset(total=data.train))
    made = scenes.train_scenes(known(data.name), data.train, seed, data.clutter)
    return Images(made.images, made.labels, made.clusters)


def test_split(data: Data) -> Images | ImageFolder:
    """The test images of a data set, the same for every run."""
    if is_real(data.name):
        return _folder(data, image_folders.read(data.name, "test").subset(data.test_per_class))
    made = scenes.test_scenes(known(data.name), data.test_per_source, data.clutter)
    return Images(made.images, made.labels, made.clusters)


def _folder(data: Data, files: Files) -> ImageFolder:
    assert data.image_size is not None
    return ImageFolder(files, View(data.image_size, crop_share(data.name)), cache.decoded(files))
