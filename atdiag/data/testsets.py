"""Test sets other than a run's own: names, folders and labels. Imports nothing heavy, so that planning stays fast.

==============================  =======================================================================================
``imagenet-a``, ``-r``,         images in folders, for networks with the 1,000 classes of ImageNet-1k
``-sketch``, ``-v2`` ...
``gaussian_noise:3``            the run's own test images, corrupted, at a severity from 1 to 5 (without a number: 3)
``clean``                       the run's own test images as they are
==============================  =======================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atdiag.core import text
from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Data, Network
from atdiag.data import image_folders, sources
from atdiag.data.catalogue import CORRUPTIONS, SEVERITIES, SMALLEST, TEST_SETS, crop_share, synsets
from atdiag.data.files import Files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from atdiag.data.splits import Split

SEMANTICS = 1
"""Incremented when a name and image come to mean other pixels or labels: stored predictions are then recomputed."""

CLEAN = "clean"
ALL_CORRUPTIONS = "corruptions"
"""Name for all corruptions: ``corruptions``, ``corruptions:5``."""
MIDDLE = 3
"""Default severity of a corruption."""


@dataclass(frozen=True)
class TestSet:
    """A test set by its full name: one of ``TEST_SETS``, ``clean``, or a corruption with its severity."""

    __test__ = False  # keeps pytest from collecting it because of its name

    name: str
    corruption: str | None = None
    severity: int | None = None

    @property
    def file(self) -> str:
        """Name of its file in a run's directory, without the suffix."""
        return self.name.replace(":", "-")

    @property
    def own_images(self) -> bool:
        """Whether it is made from the run's own test images, so that it fits every run."""
        return self.name not in TEST_SETS


def find(name: str) -> TestSet:
    """Parse the name of a test set. Raises UserError, with suggestions, for an unknown one."""
    stem, colon, number = name.partition(":")
    if stem in CORRUPTIONS:
        severities = [str(severity) for severity in SEVERITIES]
        if colon and number not in severities:
            raise UserError(f"{name}: {number or 'nothing'} is not a severity", f"type {stem}:1 to {stem}:5")
        severity = int(number) if colon else MIDDLE
        return TestSet(f"{stem}:{severity}", stem, severity)
    if name in TEST_SETS or name == CLEAN:
        return TestSet(name)
    if colon and (stem in TEST_SETS or stem == CLEAN):
        raise UserError(f"{stem} has no severity", f"type {stem}")
    known = [*TEST_SETS, *CORRUPTIONS, CLEAN, ALL_CORRUPTIONS]
    raise UserError(f"unknown test set {name!r}{suggest(stem, known)}", f"known: {', '.join(known)}")


def expand(typed: Iterable[str]) -> list[TestSet]:
    """Parse names of test sets, each once and in their order.

    ``corruptions`` (or ``corruptions:5``) stands for all corruptions at a severity; a corruption, or ``corruptions``,
    with ``:all`` stands for all five severities. Raises UserError for an unknown name.
    """
    out: dict[str, TestSet] = {}
    for name in typed:
        stem, _, number = name.partition(":")
        stems = CORRUPTIONS if stem == ALL_CORRUPTIONS else (stem,)
        every = number == "all" and (stem in CORRUPTIONS or stem == ALL_CORRUPTIONS)
        for one in stems:
            wanted = [f"{one}:{severity}" for severity in SEVERITIES] if every else [name.replace(stem, one, 1)]
            out |= {found.name: found for found in map(find, wanted)}
    return list(out.values())


def check(test_set: TestSet, data: Data, network: Network) -> None:
    """Check that a network trained on a data set can be tested on a test set, and that its images are valid and here.

    Decodes no image. Raises UserError otherwise.
    """
    if test_set.own_images:
        if test_set.corruption and network.image_size < SMALLEST:
            raise UserError(
                f"corruptions need images of at least {SMALLEST} px, and these have {network.image_size} px"
            )
        sources.find(data).check(data, network)
        return
    if len(sources.find(data).imagenet_rows) != 1000 or network.classes != 1000:
        raise UserError(
            f"{test_set.name} is for networks with ImageNet-1k's 1,000 classes, "
            f"and this one has the {network.classes:,} of {data.name}",
            f"corruptions fit every data set, such as {CORRUPTIONS[0]}:{MIDDLE}",
        )
    read(test_set.name)


def read(name: str) -> Files:
    """Return the images of a set in ``TEST_SETS``, with all of ImageNet-1k's 1,000 classes, whichever occur.

    Raises UserError for a folder that is missing, has an invalid layout, or has classes outside ImageNet-1k.
    """
    facts = TEST_SETS[name]
    folder = image_folders.search(name, facts.folders)
    label = _labels(name, image_folders.class_folders(name, folder, facts))
    files: list[str] = []
    labels: list[int] = []
    for cls in sorted(label, key=label.__getitem__):
        here, _ = image_folders.class_files(folder / cls)
        if not here or (facts.per_class and len(here) != facts.per_class):
            need = f"{name} has {facts.per_class} of each class" if facts.per_class else "every class needs some"
            raise UserError(f"the class {cls} in {folder} has {len(here)} images", need)
        files += [f"{cls}/{file}" for file in here]
        labels += [label[cls]] * len(here)
    if len(files) != facts.images:
        raise UserError(f"{folder} has {len(files):,} images, {name} ({facts.title}) {facts.images:,}", "complete it")
    return Files(folder, "test", synsets(), tuple(files), tuple(files), tuple(labels))


def _labels(name: str, folders: tuple[str, ...]) -> dict[str, int]:
    """Return the label of each class folder: its number, or the index of its WordNet id in ImageNet-1k."""
    if all(cls.isdecimal() for cls in folders):
        return {cls: int(cls) for cls in folders}
    index = {synset: label for label, synset in enumerate(synsets())}
    if unknown := [cls for cls in folders if cls not in index]:
        raise UserError(
            f"{len(unknown)} of the {len(folders)} classes in the folder of {name} are not ImageNet-1k's: "
            f"{text.shortlist(unknown)}",
            f"expected {TEST_SETS[name].classes_text}",
        )
    return {cls: index[cls] for cls in folders}


@dataclass(frozen=True)
class Opened:
    """A test set's images in the view for a data set's networks.

    among: the classes to predict among, int64, sorted; None: all. fingerprint: sha256 of the list of files and sizes;
    None if the images are the run's own.
    """

    images: Split
    among: NDArray[np.int64] | None = None
    fingerprint: str | None = None


def open_images(test_set: TestSet, data: Data) -> Opened:
    """Open the images of a test set for networks trained on a data set. Raises UserError, and BrokenImageError."""
    import numpy as np

    from atdiag.data import cache
    from atdiag.data.decoding import ImageFolder, View

    if test_set.own_images:
        own = sources.find(data).test_split(data)
        if test_set.corruption is None or test_set.severity is None:
            return Opened(own)
        from atdiag.data.corruptions import Corrupted

        return Opened(Corrupted(own, test_set.corruption, test_set.severity))
    assert data.image_size is not None
    files = read(test_set.name)
    images = ImageFolder(files, View.of(data, crop_share(data.name)), cache.decoded(files), data.turns)
    classes = np.unique(images.labels)
    return Opened(images, None if len(classes) == len(files.classes) else classes, files.fingerprint())
