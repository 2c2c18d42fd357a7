"""Names of data sets, and completing a spec for one. Imports nothing heavy, so that planning stays fast."""

from __future__ import annotations

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Data
from atdiag.data import image_folders
from atdiag.data.catalogue import ANY_FOLDER, FACTS
from atdiag.data.tars import TIMM

NAMES: dict[str, int] = {"digits": 10, "larger": 9}
"""Embedded scenes -> number of classes."""


_HELD_OUT = 600
"""Held-out source digits, from which test scenes are made."""


def known(name: str) -> str:
    """Return the name itself. Raises UserError, with suggestions, for an unknown data set."""
    if name in NAMES or name in FACTS or (name.startswith((ANY_FOLDER, TIMM)) and not name.endswith(":")):
        return name
    everything = [*NAMES, *FACTS]
    raise UserError(
        f"unknown data set {name!r}{suggest(name, everything)}",
        f"known: {', '.join(everything)}, {ANY_FOLDER}PATH, {TIMM}PATH",
    )


def is_real(name: str) -> bool:
    """Return whether a data set consists of real images rather than embedded scenes."""
    return known(name) not in NAMES


def classes(data: Data | str) -> int:
    """Return the number of classes.

    Raises UserError for an unknown data set, or a user's folder that does not exist.
    """
    name = known(data if isinstance(data, str) else data.name)
    if name in NAMES:
        return NAMES[name]
    return FACTS[name].classes if name in FACTS else len(image_folders.class_names(name))


def image_size(name: str) -> int | None:
    """Return the default crop side of a real-image data set in pixels; None for scenes and users' folders.

    Needed to construct a spec: one with ``per_class`` requires an ``image_size``.
    """
    return FACTS[name].image_size if known(name) in FACTS else None


def imagenet_rows(name: str) -> tuple[int, ...]:
    """Return the ImageNet-1k indices of a data set's classes, in order; empty if they are not ImageNet-1k's."""
    return FACTS[name].imagenet if name in FACTS else ()


def test_images(data: Data) -> int:
    """Return the approximate number of test images of a spec, to estimate the cost of testing a run."""
    if data.name in NAMES:
        return _HELD_OUT * data.test_per_source
    if data.test_per_class:
        return classes(data) * data.test_per_class
    return FACTS[data.name].test if data.name in FACTS else data.train // 5


def complete(data: Data) -> Data:
    """Fill in what the data set determines: for real images ``train``, ``image_size`` and fingerprint.

    ``train`` becomes the number of training images: all, or ``per_class`` of each class. If the files determine the
    data (``folder:PATH``, ``timm:PATH``, sets that exist in several forms) their fingerprint is included; it stays None
    for a set that is not on this machine, which can't be trained on. Scenes are returned unchanged.

    Raises UserError for an unknown name, a user's folder that is missing or has an invalid layout, and a folder without
    ``image_size``, which only its owner can know.
    """
    name = known(data.name)
    if name in NAMES:
        if data.image_size is not None:
            raise UserError(f"data.image_size is of real images, and {name} are scenes", "leave it out")
        return data
    facts = FACTS.get(name)
    if facts is None and data.image_size is None:
        raise UserError(f"{name} needs data.image_size", "say which, such as --set data.image_size=224")
    have = facts.train if facts else len(image_folders.read(name, "train"))
    fingerprint = data.fingerprint
    if facts is None or (facts.in_forms and image_folders.found(name) is not None):
        fingerprint = image_folders.fingerprint(name)
    values = {
        "train": classes(data) * data.per_class if data.per_class else have,
        "image_size": data.image_size or image_size(name),
        "fingerprint": fingerprint,
    }
    return Data.model_validate({**data.model_dump(), **values})
