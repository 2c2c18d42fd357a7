"""Finished runs in another store nearby: said before they are trained again in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec

_ABOVE, _BESIDE = 4, 200
"""Folders above, and beside, that are looked into at most."""


def finished(store: Store, specs: Sequence[RunSpec], folder: Path = Path()) -> tuple[Path, int] | None:
    """Return the store nearby that has most of some runs finished, and how many; None if none has any.

    Looked into are folders of the store's name, and ``runs``: in the working directory, in those above it, and in those
    beside it.
    """
    best = None
    for root in _nearby({store.root.name, "runs"}, folder):
        if root.is_dir() and not _same(root, store.root):
            number = sum(Store(root).run(spec).finished for spec in specs)
            if number and (best is None or number > best[1]):
                best = root, number
    return best


def _nearby(names: set[str], folder: Path) -> Iterator[Path]:
    above = [folder.joinpath(*[".."] * i) for i in range(min(_ABOVE, len(folder.absolute().parents)) + 1)]
    yield from (place / name for place in above for name in sorted(names))
    try:
        with os.scandir(above[1] if len(above) > 1 else folder) as found:
            beside = sorted(one.path for _, one in zip(range(_BESIDE), found, strict=False) if one.is_dir())
    except OSError:
        return
    yield from (Path(place) / name for place in beside for name in sorted(names))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
