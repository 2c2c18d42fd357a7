"""Folders on this machine, from environment variables: data sets, and a cache kept between runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from atdiag.core.errors import UserError

DATA = "ATDIAG_DATA"
"""Environment variable for the folder of all data sets, also passed to training processes."""
CACHE = "ATDIAG_CACHE"
"""Environment variable for the cache folder."""


_DATA: ContextVar[Path | None] = ContextVar("data_dir", default=None)


def data_dir() -> Path | None:
    """Return the folder of all data sets, from :func:`looking_in`, else from the environment; None if neither."""
    given = _DATA.get()
    if given is None and (named := os.environ.get(DATA)):
        given = Path(named).expanduser().absolute()
    return given


def look_in(folder: Path | str) -> None:
    """Set the folder of all data sets for the rest of this context; the command line does so for each command."""
    _DATA.set(Path(folder).expanduser().absolute())


@contextlib.contextmanager
def looking_in(folder: Path | str | None) -> Iterator[None]:
    """Set the folder of all data sets inside the context; None: change nothing. It need not exist."""
    token = _DATA.set(_DATA.get() if folder is None else Path(folder).expanduser().absolute())
    try:
        yield
    finally:
        _DATA.reset(token)


def cache() -> Path:
    """Return the folder for decoded images, manifests and checkpoints: ``$ATDIAG_CACHE``, or the platform's default."""
    from platformdirs import user_cache_path

    own = os.environ.get(CACHE)
    return Path(own).expanduser() if own else user_cache_path("atdiag")


def writable(folder: Path, option: str) -> None:
    """Check that a folder can be created and written, without creating it. Raises UserError otherwise."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"{option} {folder}: {existing} is not a folder", f"choose another with {option}")
        with tempfile.TemporaryFile(dir=existing):  # permission bits are not enough: they allow root everything
            pass
    except OSError as fault:
        raise UserError(
            f"{option} {folder} can't be written ({fault.strerror})", f"choose another folder with {option}"
        ) from None
