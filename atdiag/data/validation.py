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
from atdiag.data.image_folders import Files


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
    count = size(validation, len(chosen))
    if count >= len(chosen):
        raise UserError(
            f"`data.validation`={validation:g} holds back all of {len(chosen):,} training images", "give a smaller one"
        )
    order = sorted(range(len(chosen)), key=lambda i: hashlib.sha256(chosen.keys[i].encode()).digest())
    held = set(stratified(chosen.labels, order, count))
    left = chosen.keep(i for i in range(len(chosen)) if i not in held)
    if empty := [name for name, images in zip(left.classes, left.counts, strict=True) if not images]:
        raise UserError(
            f"`data.validation`={validation:g} leaves no training image of {shortlist(empty)}", "give a smaller one"
        )
    return left, chosen.keep(held)
