"""Data sets by name. Imports nothing heavy, so that planning stays fast."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Data
from atdiag.data.catalogue import ANY_FOLDER, FACTS
from atdiag.data.datasets import DataSet
from atdiag.data.embedded import DIGITS, LARGER
from atdiag.data.folder_sets import FolderSet
from atdiag.data.tars import TIMM

ENTRY_POINTS = "atdiag.data_sets"
"""Entry-point group through which other packages add data sets: each names a :class:`DataSet`."""

REGISTERED: dict[str, DataSet] = {}
"""Data sets that are not image folders, by name."""


def register(data_set: DataSet) -> None:
    """Add a data set for this process. Raises ValueError for a name that is taken or invalid."""
    name = data_set.name
    if not name or any(character in name for character in ":/, "):
        raise ValueError(f"{name!r} can't be a data set's name: no ':', '/', ',' or space")
    if name in REGISTERED or name in FACTS:
        raise ValueError(f"there is already a data set {name!r}")
    REGISTERED[name] = data_set


register(DIGITS)
register(LARGER)


@cache
def _installed() -> None:
    """Register the data sets of other packages, once."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as fault:  # an error in another package must not disable all data sets
            warnings.warn(f"the data set {entry.name!r} of {entry.value} is left out ({fault})", stacklevel=2)


def listed() -> list[DataSet]:
    """Return all data sets with a fixed name: embedded ones, then those of the catalogue."""
    _installed()
    return [*REGISTERED.values(), *map(FolderSet, FACTS)]


def find(name: Data | str) -> DataSet:
    """Look up a data set by its name, or a spec's. Raises UserError, with a suggestion, for an unknown name."""
    name = name if isinstance(name, str) else name.name
    if name in REGISTERED:
        return REGISTERED[name]
    if name in FACTS or (name.startswith((ANY_FOLDER, TIMM)) and not name.endswith(":")):
        return FolderSet(name)
    _installed()  # only now: searching all installed packages takes a while
    if name in REGISTERED:
        return REGISTERED[name]
    everything = [*REGISTERED, *FACTS]
    raise UserError(
        f"unknown data set {name!r}{_near(name, everything)}",
        f"known: {', '.join(everything)}, {ANY_FOLDER}PATH, {TIMM}PATH",
    )


def named(typed: str) -> str:
    """Return the name of a data set as typed by a user: a known name, or a folder by its path.

    A name without a path is a known one before it is a folder. Raises UserError for neither.
    """
    if typed in REGISTERED or typed in FACTS or typed.startswith((ANY_FOLDER, TIMM)):
        return find(typed).name
    folder = Path(typed).expanduser()
    if folder.is_dir():
        return f"{ANY_FOLDER}{folder.absolute()}"
    if folder.exists():
        raise UserError(f"{typed} is a file", f"give the folder of the images, such as {folder.parent}")
    if not any(mark in typed for mark in "/\\~") and find_or_none(typed):
        return typed
    beside = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
    if near := suggest(folder.name, beside):
        raise UserError(f"there is no folder {typed}{near}")
    raise UserError(
        f"there is no folder and no data set {typed}{suggest(typed, (*REGISTERED, *FACTS))}",
        "give a folder of images, or a name that 'atdiag data' lists",
    )


def find_or_none(name: str) -> DataSet | None:
    """Look up a data set by its name; None for an unknown one."""
    try:
        return find(name)
    except UserError:
        return None


def is_real(name: str) -> bool:
    """Return whether a data set is of real images, whose size is free."""
    return isinstance(find(name), FolderSet)


def _near(name: str, known: Iterable[str]) -> str:
    kind, sign, path = name.partition(":")
    if not sign:
        return suggest(name, known)
    near = suggest(f"{kind}:", (ANY_FOLDER, TIMM))
    return f"{near[:-2]}{path or 'PATH'}'?" if near else ""


def complete(data: Data, train: int | None = None) -> Data:
    """Return a spec with the fields that its data set determines: see :meth:`DataSet.complete`. Raises UserError."""
    return find(data).complete(data, train)
