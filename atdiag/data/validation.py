"""Choice of the training images held out for validation. Imports nothing heavy, since planning uses it too.

The choice is stratified by class and nested: a larger part contains a smaller one. Nothing is selected on test images,
so whatever is selected (a training length, a checkpoint) is selected on this part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

from atdiag.core.errors import UserError
from atdiag.core.text import shortlist
from atdiag.data.files import Files


def size(validation: float | None, images: int) -> int:
    """Return the number of images that ``data.validation`` means: itself, or that share of the images, at least one.

    >>> size(0.1, 2500), size(40, 2500), size(None, 2500)
    (250, 40, 0)
    """
    if validation is None:
        return 0
    return int(validation) if validation >= 1 else max(1, round(validation * images))


def stratified(labels: Sequence[int], order: Iterable[int], count: int) -> list[int]:
    """Return ``count`` indices into ``labels``, stratified by class to within one image.

    ``order``: all indices, in the order in which those of a class are taken. The i-th of a class of n gets the rank
    (i + 1/2) / n, and the ``count`` lowest ranks are returned.
    """
    sizes, seen = Counter(labels), Counter[int]()
    place: dict[int, float] = {}
    for i in order:
        place[i] = (seen[labels[i]] + 0.5) / sizes[labels[i]]
        seen[labels[i]] += 1
    return sorted(place, key=place.__getitem__)[:count]


def divide(chosen: Files, validation: float | None) -> tuple[Files, Files]:
    """Divide training images into those left for training, and those held out by the sha256 of their key.

    Raises UserError if a class, or the whole set, would have nothing left.
    """
    return _divided(chosen, validation, "", "data.validation")


def test_part(images: Files, split: float, seed: int) -> tuple[Files, Files]:
    """Divide a folder without test images: into training and test images, by the sha256 of ``seed:class/file``.

    Raises UserError if a class would have no training or no test image.
    """
    left, held = _divided(images, split, f"{seed}:", "data.split")
    if empty := [name for name, number in zip(held.classes, held.counts, strict=True) if not number]:
        raise UserError(f"`data.split`={split:g} leaves no test image of {shortlist(empty)}", "give a larger one")
    return left, held


def _divided(images: Files, share: float | None, salt: str, setting: str) -> tuple[Files, Files]:
    count = size(share, len(images))
    if count >= len(images):
        raise UserError(
            f"`{setting}`={share:g} holds back all of {len(images):,} training images", "give a smaller one"
        )

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{salt}{images.keys[index]}".encode()).digest()

    held = set(stratified(images.labels, sorted(range(len(images)), key=digest), count))
    left = images.keep(i for i in range(len(images)) if i not in held)
    if empty := [name for name, number in zip(left.classes, left.counts, strict=True) if not number]:
        raise UserError(f"`{setting}`={share:g} leaves no training image of {shortlist(empty)}", "give a smaller one")
    return left, images.keep(held)
