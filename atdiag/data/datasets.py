"""What a data set is: what everything else asks of one. Imports nothing heavy: planning asks, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.core.text import count
from atdiag.data.image_folders import Files, SplitName

if TYPE_CHECKING:
    from atdiag.data.splits import Split


class DataSet(Protocol):
    """A data set. A spec (:class:`~atdiag.core.spec.Data`) names one and says which of its images are meant.

    :mod:`~atdiag.data.sources` finds one by name. It reads no image before a split is asked for.
    """

    @property
    def name(self) -> str:
        """The name in specs."""

    @property
    def classes(self) -> int:
        """Number of classes. Raises UserError where only the folder says it, and that is not there."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels; empty where they are not known on this machine."""

    @property
    def image_size(self) -> int | None:
        """Side of the images that networks see unless a spec says otherwise, in pixels; None: every spec says it."""

    @property
    def imagenet_rows(self) -> tuple[int, ...]:
        """Where the classes are ImageNet-1k's: their indices there, in the order of the labels; else empty."""

    @property
    def cluster(self) -> str:
        """What test images of one cluster share, such as "source digit"; empty: every image is its own cluster."""

    def row(self) -> dict[str, Any]:
        """Return its row in ``atdiag data``: see :func:`atdiag.data.listing.rows`."""

    def usual(self, beside: Data) -> Data:
        """Return the spec that the name alone stands for, at a profile whose own data are ``beside``."""

    def complete(self, data: Data, train: int | None = None) -> Data:
        """Return the spec with what the data set itself decides, such as sizes and fingerprints.

        train: how many training images were asked for, if that was said. Raises UserError for a spec that does not fit.
        """

    def resized(self, data: Data, size: int) -> Data:
        """Return the spec with images of ``size`` x ``size``, where they come in any size; else the spec itself."""

    def with_train(self, data: Data, count: int) -> Data:
        """Return the spec with ``count`` training images, where they are made in any number; else the spec itself."""

    def shape(self, data: Data) -> tuple[int, int]:
        """Return channels and side of the images that networks see. Raises ValueError for a spec without a size."""

    def test_images(self, data: Data) -> int:
        """Return about how many test images a spec means, for an estimate of what a test costs."""

    def validation_images(self, data: Data) -> int:
        """Return how many images a spec holds back for validation, 0 for none; for an estimate, as above."""

    def head_rows(self, classes: int) -> tuple[int, ...] | None:
        """Return the rows of a teacher's head of ``classes`` outputs that are this set's classes, in order of labels.

        None where such a head is for another task.
        """

    def check(self, data: Data, network: Network) -> None:
        """Look at the images that a spec means, in seconds and decoding none, before anything is trained on them.

        Raises UserError for images that are not here, or not what name and spec say (layout, classes, numbers,
        fingerprint, memory); ValueError for a network that does not fit.
        """

    def folder(self) -> Path | None:
        """Return the folder in which the images lie; None where it is not found, or where there is none."""

    def files(self) -> dict[SplitName, Files] | None:
        """Return the files of both splits, which can be hashed; None for a data set that has none.

        Raises UserError where they are not what the name says.
        """

    def train_split(self, data: Data, seed: int) -> Split:
        """Return the training images, a pure function of spec and data seed."""

    def validation_split(self, data: Data, seed: int) -> Split | None:
        """Return the images held back for validation, a pure function of spec and data seed; None: none are."""

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
    """Raise ValueError for a network that is for other classes or images than a data set's.

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
