"""Folders on this machine, from environment variables: data sets, runs, and a cache kept between runs."""

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
RUNS = "ATDIAG_RUNS"
"""Environment variable for the folder of runs."""


_DATA: ContextVar[Path | None] = ContextVar("data_dir", default=None)
_RUNS: ContextVar[Path | None] = ContextVar("runs", default=None)


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


def runs() -> Path:
    """Return the folder of runs, from :func:`runs_are_in`, else from the environment, else ``runs``.

    Teachers that are named by a run's id (``run:ID``) are looked for there.
    """
    return _RUNS.get() or Path(os.environ.get(RUNS) or "runs").expanduser()


def runs_are_in(folder: Path) -> None:
    """Set the folder of runs for the rest of this context; resolving a command's settings does so."""
    _RUNS.set(folder)


def cache() -> Path:
    """Return the folder for decoded images, manifests and checkpoints: ``$ATDIAG_CACHE``, or the platform's default."""
    from platformdirs import user_cache_path

    own = os.environ.get(CACHE)
    return Path(own).expanduser() if own else user_cache_path("atdiag")


_LONGEST = 120
"""Characters that a run's own files add to the path of a store: its id, TensorBoard's folder and event file."""


def is_folder(path: Path) -> bool:
    """Return whether a path is a readable folder; False also for a name that the system refuses."""
    try:
        return path.is_dir()
    except OSError:
        return False


def writable(folder: Path, argument: str) -> None:
    """Make sure that a folder can be made and written, without making it. Raises UserError otherwise."""
    try:
        existing = _existing(folder)
        if not existing.is_dir():
            raise UserError(f"`{argument}` {folder}: {existing} is not a folder", f"choose another with `{argument}`")
        with tempfile.TemporaryFile(dir=existing):  # permission bits are not enough: they allow root everything
            pass
    except OSError as fault:
        raise UserError(
            f"`{argument}` {folder} can't be written ({fault.strerror})", f"choose another folder with `{argument}`"
        ) from None


def fit_for_runs(folder: Path, argument: str) -> None:
    """Make sure that a folder can hold runs: :func:`writable`, with room for longer names, and with file locks.

    Raises UserError where not: locks are what keeps two processes from training one run.
    """
    from filelock import FileLock

    writable(folder, argument)
    try:
        existing = _existing(folder)
        longest = os.pathconf(existing, "PC_PATH_MAX") if hasattr(os, "pathconf") else 4096
        if len(os.fsencode(folder.absolute())) + _LONGEST > longest:
            raise UserError(
                f"`{argument}` {folder} is too long for the files of a run below it", "choose a shorter name"
            )
        with (
            tempfile.TemporaryDirectory(dir=existing, prefix=".atdiag-") as place,
            FileLock(f"{place}/lock", timeout=1),
        ):
            pass
    except (OSError, NotImplementedError) as fault:
        why = getattr(fault, "strerror", None) or str(fault)
        raise UserError(
            f"`{argument}` {folder} lies on a file system without file locks ({why}), which runs need",
            f"choose a folder on another with `{argument}`, or mount it with locks (NFS: without nolock)",
        ) from None


def _existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
