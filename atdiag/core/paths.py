"""Folders of this machine that environment variables name: where data sets lie, and what may be kept between runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from atdiag.core.errors import UserError

DATA = "ATDIAG_DATA"
"""Names the folder of all data sets, here and for the processes that train."""
CACHE = "ATDIAG_CACHE"
"""Names the cache folder."""


_DATA: ContextVar[Path | None] = ContextVar("data_dir", default=None)


def data_dir() -> Path | None:
    """Return the folder of all data sets: that of :func:`looking_in`, else the environment's; None where neither."""
    given = _DATA.get()
    if given is None and (named := os.environ.get(DATA)):
        given = Path(named).expanduser().absolute()
    return given


def look_in(folder: Path | str) -> None:
    """Look for data sets in a folder for the rest of this context, which a command line enters for each command."""
    _DATA.set(Path(folder).expanduser().absolute())


@contextlib.contextmanager
def looking_in(folder: Path | str | None) -> Iterator[None]:
    """Look for data sets in a folder while it lasts; None: change nothing. It need not be there."""
    token = _DATA.set(_DATA.get() if folder is None else Path(folder).expanduser().absolute())
    try:
        yield
    finally:
        _DATA.reset(token)


def cache() -> Path:
    """Where decoded images, manifests and checkpoints are kept: ``$ATDIAG_CACHE``, or the machine's usual place."""
    from platformdirs import user_cache_path

    own = os.environ.get(CACHE)
    return Path(own).expanduser() if own else user_cache_path("atdiag")


def writable(folder: Path, argument: str) -> None:
    """Make sure that a folder can be made and written, without making it. Raises UserError otherwise."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"`{argument}` {folder}: {existing} is not a folder", f"choose another with `{argument}`")
        with tempfile.TemporaryFile(dir=existing):  # asking the system is no use: root may write anywhere, it says
            pass
    except OSError as fault:
        raise UserError(
            f"`{argument}` {folder} can't be written ({fault.strerror})", f"choose another folder with `{argument}`"
        ) from None
