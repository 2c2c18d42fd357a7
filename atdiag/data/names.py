"""Which data sets there are, and what a spec of one is. Imports nothing heavy, so that planning stays fast."""

from __future__ import annotations

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Data
from atdiag.data import image_folders
from atdiag.data.catalogue import ANY_FOLDER, FACTS
from atdiag.data.tars import TIMM

NAMES: dict[str, int] = {"digits": 10, "larger": 9}
"""Embedded scenes -> number of classes."""


_HELD_OUT = 600
"""Held-out source digits, of which test scenes are made."""


def known(name: str) -> str:
    """The name itself. Raises UserError, with what may have been meant, for a name that is no data set."""
    if name in NAMES or name in FACTS or (name.startswith((ANY_FOLDER, TIMM)) and not name.endswith(":")):
        return name
    everything = [*NAMES, *FACTS]
    raise UserError(
        f"unknown data set {name!r}{suggest(name, everything)}",
        f"known: {', '.join(everything)}, {ANY_FOLDER}PATH, {TIMM}PATH",
    )


def is_real(name: str) -> bool:
    """Whether a data set is of real images in a folder, and not of embedded scenes."""
    return known(name) not in NAMES


def classes(data: Data | str) -> int:
    """Number of classes. Raises UserError for an unknown data set, or a folder of one's own that is not there."""
    name = known(data if isinstance(data, str) else data.name)
    if name in NAMES:
        return NAMES[name]
    return FACTS[name].classes if name in FACTS else len(image_folders.class_names(name))


def image_size(name: str) -> int | None:
    """The side of the crop that a set of real images decides, in pixels; None for scenes and folders of one's own.

    For who makes a spec: one with ``per_class`` can't be made without an ``image_size``.
    """
    return FACTS[name].image_size if known(name) in FACTS else None


def imagenet_rows(name: str) -> tuple[int, ...]:
    """Where a data set's classes are ImageNet-1k's: their indices there, in order; else empty."""
    return FACTS[name].imagenet if name in FACTS else ()


def test_images(data: Data) -> int:
    """About how many test images a spec means, for an estimate of what measuring a run costs."""
    if data.name in NAMES:
        return _HELD_OUT * data.test_per_source
    if data.test_per_class:
        return classes(data) * data.test_per_class
    return FACTS[data.name].test if data.name in FACTS else data.train // 5


def complete(data: Data) -> Data:
    """The spec of a data set with what the set itself decides: of real images, ``train``, ``image_size``, fingerprint.

    ``train`` becomes the number of training images that the spec means: all, or ``per_class`` of each class. Where the
    files decide (``folder:PATH``, ``timm:PATH``, sets that are kept in several forms) their fingerprint is taken; it
    stays None for a set that is not on this machine, which nothing trains with. Scenes come back as they are.

    Raises UserError for an unknown name, a folder of one's own that is not there or not laid out as it should be, and
    one without ``image_size``, which only its owner can know.
    """
    name = known(data.name)
    if name in NAMES:
        if data.image_size is not None:
            raise UserError(
                f"data.image_size is for real images, and {name} are scenes of a fixed size", "leave it out"
            )
        return data
    facts = FACTS.get(name)
    if facts is None and data.image_size is None:
        raise UserError(f"{name} needs data.image_size", "give one, such as `data.image_size`=224")
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
