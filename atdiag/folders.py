"""Folders of this machine that environment variables name: where data sets lie, and what may be kept between runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from atdiag.words import UserError

DATA = "ATDIAG_DATA"
"""Names the folder of all data sets, here and for the processes that train."""
CACHE = "ATDIAG_CACHE"
"""Names the cache folder."""


def look_in(folder: Path) -> None:
    """Let this process and those that it starts find data sets there, as ``--data-dir`` says.

    Raises UserError where it is no folder.
    """
    if not folder.expanduser().is_dir():
        raise UserError(f"--data-dir {folder} is no folder")
    _set(folder)


def usually_look_in(folder: Path) -> None:
    """The same for a folder that stands in a file of settings: what the environment names goes before.

    It need not be there: most commands need no data set, and one that does says where it looked.
    """
    if DATA not in os.environ:
        _set(folder)


def _set(folder: Path) -> None:
    os.environ[DATA] = str(folder.expanduser().absolute())


def cache() -> Path:
    """Where decoded images, manifests and checkpoints are kept: ``$ATDIAG_CACHE``, or the machine's usual place."""
    from platformdirs import user_cache_path

    own = os.environ.get(CACHE)
    return Path(own).expanduser() if own else user_cache_path("atdiag")


def writable(folder: Path, option: str) -> None:
    """Make sure that a folder can be made and written, without making it. Raises UserError otherwise."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"{option} {folder}: {existing} is not a folder", f"choose another with {option}")
        with tempfile.TemporaryFile(dir=existing):  # asking the system is no use: root may write anywhere, it says
            pass
    except OSError as fault:
        raise UserError(
            f"{option} {folder} can't be written ({fault.strerror})", f"choose another folder with {option}"
        ) from None
