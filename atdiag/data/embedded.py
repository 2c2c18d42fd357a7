"""Data sets without files, whose images are generated on demand. Imports nothing heavy.

A user's own data set is one :class:`EmbeddedSet` with two functions that make its images; see there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atdiag.core import resources
from atdiag.core.errors import UserError
from atdiag.core.spec import Data, Network
from atdiag.core.spec.data import OF_SCENES
from atdiag.data import validation
from atdiag.data.catalogue import CANVAS
from atdiag.data.datasets import check_fit
from atdiag.data.files import Files, SplitName

if TYPE_CHECKING:
    from atdiag.data.scenes import Scenes
    from atdiag.data.splits import Images

USUAL = Data(name="digits", train=2500, clutter=6)
"""The data of profile mini. Embedded sets have these sizes also in profiles with real images."""

EMBEDDED = "embedded"
"""Shown by ``atdiag data`` in place of a folder."""

Setting = Literal["test_per_source", "clutter", "test_draw"]
"""Name of a spec's field that only embedded sets have."""

_SETTINGS: frozenset[Setting] = frozenset(OF_SCENES)


@dataclass(frozen=True)
class EmbeddedSet:
    """A data set whose images are generated, in one size and any number::

        STRIPES = EmbeddedSet(
            name="stripes",
            title="stripes, upright or lying",
            classes=2,
            image_size=16,
            make_train=make_train,  # (data, seed) -> Images, as many as data.train
            make_test=make_test,  # (data) -> Images
            sources=50,
            cluster="pattern",
        )

    ``sources.register(STRIPES)`` adds it to a process. An entry point adds it to every process, the command line's and
    the workers' included::

        [project.entry-points."atdiag.data_sets"]
        stripes = "my_package.stripes:STRIPES"

    The functions must be pure, and draw with ``randomness.generator(seed, "a name of their own", ...)``, so that a run
    can be reproduced from its spec.
    """

    name: str
    title: str
    classes: int
    image_size: int
    make_train: Callable[[Data, int], Images]
    make_test: Callable[[Data], Images]
    sources: int
    """Number of test images if ``data.test_per_source`` is 1: about the number of clusters, if any."""
    channels: int = 1
    cluster: str = ""
    """What the test images of a cluster share, in one or two words; empty: every image is its own cluster."""
    settings: frozenset[Setting] = frozenset({"test_per_source"})
    """Fields of ``Data`` for embedded images that have an effect; the others are reset to their defaults."""
    make_validation: Callable[[Data, int], Images] | None = None
    """``(data, seed)`` -> images held out for validation; if ``data.validation`` is given, ``make_train`` must not use
    what these are made of. None: ``data.validation`` can't be given."""
    known_to_teachers: bool = False
    """Whether heads of teachers with as many classes are for this task: the miniature teachers know ``digits``."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the labels, used to match a teacher's head; empty: not known."""
    source: str = ""
    licence: str = ""

    @property
    def imagenet_rows(self) -> tuple[int, ...]:
        """Empty: the classes are not ImageNet's."""
        return ()

    def row(self) -> dict[str, Any]:
        """Return the data set's row in ``atdiag data``."""
        return {
            "name": self.name,
            "title": self.title,
            "classes": self.classes,
            "train": None,
            "test": None,
            "resolution": f"{self.image_size} x {self.image_size}",
            "normalisation": "own",
            "source": self.source,
            "licence": self.licence,
            "folder": EMBEDDED,
        }

    def usual(self, beside: Data) -> Data:
        """Return the profile's spec under this name; in a profile with real images, that of mini."""
        spec = beside if beside.image_size is None else USUAL
        return spec.model_copy(update={"name": self.name})

    def complete(self, data: Data, train: int | None = None) -> Data:
        """Return the spec, with ignored settings reset to their defaults.

        train: unused, ``data.train`` has it. Raises UserError for an image size, and for a validation part if the set
        has none.
        """
        if data.image_size is not None:
            raise UserError(
                f"`data.image_size` is of real images, and {self.name} are embedded ({self.image_size} px)",
                "leave it out",
            )
        if data.validation is not None and self.make_validation is None:
            raise UserError(f"`data.validation`: {self.name} makes no images for validation", "leave it out")
        unheeded = _SETTINGS - self.settings
        if not unheeded:
            return data
        return data.model_copy(update={field: Data.model_fields[field].default for field in unheeded})

    def resized(self, data: Data, size: int) -> Data:
        """Return the spec itself: the images have one size."""
        return data

    def with_train(self, data: Data, count: int) -> Data:
        """Return the spec with ``count`` training images."""
        return data.model_copy(update={"train": count})

    def shape(self, data: Data) -> tuple[int, int]:
        """Return channels and side of the images."""
        return self.channels, self.image_size

    def test_images(self, data: Data) -> int:
        """Return the approximate number of test images of a spec."""
        return self.sources * data.test_per_source

    def validation_images(self, data: Data) -> int:
        """Return the number of images a spec holds out for validation."""
        return validation.size(data.validation, data.train)

    def head_rows(self, classes: int) -> tuple[int, ...] | None:
        """Return all rows of a head with as many classes, if teachers are trained for this data set; else None."""
        return tuple(range(classes)) if self.known_to_teachers and classes == self.classes else None

    def check(self, data: Data, network: Network) -> None:
        """Raise ValueError for a network that does not fit, UserError for more images than fit in memory."""
        check_fit(self, data, network)
        count = data.train + self.validation_images(data) + self.test_images(data)
        resources.room(
            count * self.channels * self.image_size**2,
            f"{count:,} images of {self.name}",
            "make `data.train`, `data.validation` or `data.test_per_source` smaller",
        )

    def folder(self) -> Path | None:
        """Return None: there is none."""
        return None

    def files(self) -> dict[SplitName, Files] | None:
        """Return None: there are none."""
        return None

    def train_split(self, data: Data, seed: int) -> Images:
        """Return the ``data.train`` images of a data seed. Raises ValueError if ``make_train`` returns others."""
        images = self._turned(self.make_train(data, seed), data)
        if len(images) != data.train:
            raise ValueError(f"the data set {self.name} made {len(images)} training images, not {data.train}")
        return images

    def validation_split(self, data: Data, seed: int) -> Images | None:
        """Return the images held out for validation; None if there are none.

        Raises ValueError if ``make_validation`` returns others than declared.
        """
        if data.validation is None or self.make_validation is None:
            return None
        images = self._turned(self.make_validation(data, seed), data)
        if len(images) != (count := self.validation_images(data)):
            raise ValueError(f"the data set {self.name} made {len(images)} images for validation, not {count}")
        return images

    def test_split(self, data: Data) -> Images:
        """Return the test images. Raises ValueError if ``make_test`` returns others than declared."""
        return self._turned(self.make_test(data), data)

    def _turned(self, images: Images, data: Data) -> Images:
        """Return sound images, turned as the spec says. Raises as :meth:`_sound`."""
        import numpy as np

        images = self._sound(images)
        if not data.turns:
            return images
        return replace(images, pixels=np.ascontiguousarray(np.rot90(images.pixels, data.turns, axes=(2, 3))))

    def _sound(self, images: Images) -> Images:
        """Return the images. Raises ValueError for another type or shape than declared, or labels out of range."""
        n, side = len(images), self.image_size
        for what, kind, shape, wanted in (
            ("pixels", images.pixels.dtype, images.pixels.shape, ("uint8", (n, self.channels, side, side))),
            ("labels", images.labels.dtype, images.labels.shape, ("int64", (n,))),
            ("clusters", images.clusters.dtype, images.clusters.shape, ("int64", (n,))),
        ):
            if (str(kind), shape) != wanted:
                raise ValueError(f"the data set {self.name} made {what} of {kind} {shape}, not {wanted[0]} {wanted[1]}")
        if not n or images.labels.min() < 0 or images.labels.max() >= self.classes:
            raise ValueError(f"the data set {self.name} made no image, or labels other than 0 to {self.classes - 1}")
        return images


def _train_scenes(task: str, data: Data, seed: int) -> Images:
    from atdiag.data import scenes

    return _images(scenes.train_scenes(task, data.train, seed, data.clutter, data.validation))


def _validation_scenes(task: str, data: Data, seed: int) -> Images:
    from atdiag.data import scenes

    assert data.validation is not None
    count = validation.size(data.validation, data.train)
    return _images(scenes.validation_scenes(task, count, seed, data.clutter, data.validation))


def _test_scenes(task: str, data: Data) -> Images:
    from atdiag.data import scenes

    return _images(scenes.test_scenes(task, data.test_per_source, data.clutter, data.test_draw))


def _images(made: Scenes) -> Images:
    from atdiag.data.splits import Images

    return Images(made.images, made.labels, made.clusters)


def _scenes(name: str, title: str, classes: int) -> EmbeddedSet:
    return EmbeddedSet(
        name=name,
        title=f"scenes of handwritten digits: {title}",
        classes=classes,
        image_size=CANVAS,
        make_train=partial(_train_scenes, name),
        make_test=partial(_test_scenes, name),
        make_validation=partial(_validation_scenes, name),
        sources=600,
        cluster="source digit",
        settings=_SETTINGS,
        known_to_teachers=True,
        source="scikit-learn",
        licence="CC BY 4.0",
    )


DIGITS = _scenes("digits", "which digit", 10)
LARGER = _scenes("larger", "the larger of two", 9)
