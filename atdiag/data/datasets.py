"""The interface of a data set. Imports nothing heavy, since planning uses it too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.core.text import count
from atdiag.data.files import Files, SplitName

if TYPE_CHECKING:
    from atdiag.data.splits import Split


class DataSet(Protocol):
    """A data set. A spec (:class:`~atdiag.core.spec.Data`) names one and selects its images.

    :mod:`~atdiag.data.sources` finds one by name. No image is read before a split is requested.
    """

    @property
    def name(self) -> str:
        """Name in specs."""

    @property
    def classes(self) -> int:
        """Number of classes. Raises UserError if only the folder determines it, and that is missing."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; empty if not known on this machine."""

    @property
    def image_size(self) -> int | None:
        """Default side of the images that networks see, in pixels; None: every spec must give it."""

    @property
    def imagenet_rows(self) -> tuple[int, ...]:
        """If the classes are ImageNet-1k's: their indices there, in the order of the labels; else empty."""

    @property
    def cluster(self) -> str:
        """What the test images of a cluster share, such as "source digit"; empty: every image is its own cluster."""

    def row(self) -> dict[str, Any]:
        """Return the data set's row in ``atdiag data``: see :func:`atdiag.data.listing.rows`."""

    def usual(self, beside: Data) -> Data:
        """Return the spec that the name alone stands for, in a profile whose default data are ``beside``."""

    def complete(self, data: Data, train: int | None = None) -> Data:
        """Return the spec with the fields that the data set determines, such as sizes and fingerprints.

        train: requested number of training images, if any. Raises UserError for a spec that does not fit.
        """

    def resized(self, data: Data, size: int) -> Data:
        """Return the spec with images of ``size`` x ``size`` if the size is free; else the spec itself."""

    def with_train(self, data: Data, count: int) -> Data:
        """Return the spec with ``count`` training images if any number can be made; else the spec itself."""

    def shape(self, data: Data) -> tuple[int, int]:
        """Return channels and side of the images that networks see. Raises ValueError for a spec without a size."""

    def test_images(self, data: Data) -> int:
        """Return the approximate number of test images of a spec, to estimate the cost of a test."""

    def validation_images(self, data: Data) -> int:
        """Return the number of images a spec holds out for validation (0: none); approximate, as above."""

    def head_rows(self, classes: int) -> tuple[int, ...] | None:
        """Return the rows of a teacher's head of ``classes`` outputs for this set's classes, in the order of labels.

        None if such a head is for another task.
        """

    def check(self, data: Data, network: Network) -> None:
        """Check the images of a spec before training: takes seconds, and decodes none.

        Raises UserError for images that are missing or contradict the name or the spec (layout, classes, numbers,
        fingerprint, memory); ValueError for a network that does not fit.
        """

    def folder(self) -> Path | None:
        """Return the folder of the images; None if it is not found, or if there is none."""

    def files(self) -> dict[SplitName, Files] | None:
        """Return the files of both splits, for hashing; None for a data set without files.

        Raises UserError if they contradict the name.
        """

    def train_split(self, data: Data, seed: int) -> Split:
        """Return the training images, a pure function of spec and data seed."""

    def validation_split(self, data: Data, seed: int) -> Split | None:
        """Return the images held out for validation, a pure function of spec and data seed; None if there are none."""

    def test_split(self, data: Data) -> Split:
        """Return the test images, the same for every run."""


def check_classes(name: str, number: int) -> None:
    """Raise UserError for a data set with fewer than two classes, on which every network is always right."""
    if number < 2:
        raise UserError(
            f"{name} has {count(number, 'class')}, so that every network would be right on every image",
            "training needs at least two classes, each in a folder of its own",
        )


def check_fit(data_set: DataSet, data: Data, network: Network) -> None:
    """Raise ValueError for a network whose classes or image shape differ from the data set's.

    Raises UserError for a data set with fewer than two classes.
    """
    number = data_set.classes
    check_classes(data_set.name, number)
    channels, size = data_set.shape(data)
    for what, have, need in (
        ("classes", network.classes, number),
        ("channels", network.channels, channels),
        ("image_size", network.image_size, size),
    ):
        if have != need:
            raise ValueError(f"the network has {what} {have}, the data set {data.name} {need}")
