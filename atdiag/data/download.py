"""Download a freely available data set, for ``atdiag data check NAME --download``.

Everything happens in a hidden folder next to the data set's place, from where the complete data set is moved. Remains
of an interrupted download are never mistaken for it, and the next download removes them.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout

from atdiag.core.errors import UserError
from atdiag.core.resources import GIB, MIB
from atdiag.data import archives, image_folders, sources
from atdiag.data.catalogue import FACTS, Archive, Facts

Report = Callable[[str, int, int], None]
"""Progress callback: (stage, done, total)."""

SCHEMES = ("https",)
_SECONDS = 60
"""Timeout of a silent server, in seconds."""
_BLOCK = 4096
"""Bytes that the smallest file occupies on most disks."""


class DownloadError(OSError):
    """A data set could not be downloaded; one line says why. Nothing of it is left behind."""


def fetch(name: str, report: Report = lambda what, done, total: None) -> Path | None:
    """Download a data set into the folder of all data sets; None if it is already there.

    An archive found there under its published name is used instead of a download. Raises UserError if nothing may be
    downloaded or no folder is configured, DownloadError if the archive is unavailable, differs from the published one
    or does not fit on the disk, OSError if the folder can't be written.
    """
    facts = FACTS.get(sources.find(name).name)
    if _is_there(name):
        return None
    if facts is None:
        raise UserError(f"{name} can't be downloaded", "only published sets of real images can be")
    if facts.archive is None:
        raise UserError(
            f"{name} can't be downloaded because {facts.closed}",
            f"get it from {facts.source} and put it below `data_dir` as '{facts.folders[0]}' (see docs/data.md)",
        )
    root = image_folders.data_folder(name, facts.folders)
    if not root.is_dir():
        image_folders.find(name)  # raises the error that says so
    part, place = root / f".{name}-part", root / facts.folders[0]
    with _alone(root / f".{name}.lock", lambda: report(f"waiting for another download of {name}", 0, 0)):
        if _is_there(name):
            return None
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if place.exists() or place.is_symlink():
            raise UserError(f"{place} is in the way of {name}, and is no folder", "move it away")
        _remove(part)  # left by a killed process: we hold the lock
        try:
            part.mkdir()
            _make(name, facts, facts.archive, part, report)
            (part / name).rename(place)
        finally:
            _remove(part)
    return place


def _is_there(name: str) -> bool:
    """Whether the data set's folder is found, with anything in it."""
    place = sources.find(name).folder()
    return place is not None and any(place.iterdir())


@contextmanager
def _alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _make(name: str, facts: Facts, archive: Archive, part: Path, report: Report) -> None:
    """Create the complete data set as the folder of its name in ``part``."""
    images = facts.train + facts.test
    need, free = 2 * archive.size + _BLOCK * images, shutil.disk_usage(part).free
    if need > free:
        raise DownloadError(f"{name} needs {need / GIB:.1f} GiB in {part.parent}, where {free / GIB:.1f} are free")
    own = part.parent / PurePosixPath(archive.url).name
    path = own if own.is_file() else part / own.name
    if path != own:
        _download(name, archive, path, own, report)
    with path.open("rb") as file:
        if (md5 := hashlib.file_digest(file, _md5).hexdigest()) != archive.md5:
            kept = f"remove {own}" if path == own else "it is removed"
            raise DownloadError(f"{archive.url} came with md5 {md5}, published is {archive.md5}: {kept}; try again")
    try:
        archives.unpack(name, facts, path, part / name, lambda done: report(f"unpacking {name}", done, images))
    except ValueError as fault:
        raise DownloadError(f"{archive.url} is not the archive of {name} that was published ({fault})") from None


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)  # some systems forbid MD5 for security


# --- the network ------------------------------------------------------------------------------------------------------


class _SchemesOnly(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if url.partition("://")[0] not in SCHEMES:
        raise OSError(f"{url} is not an https address")


def _download(name: str, archive: Archive, path: Path, own: Path, report: Report) -> None:
    done = 0
    with path.open("wb") as file:
        try:
            for block in _blocks(archive.url):
                done += len(block)
                if done > archive.size:
                    break
                file.write(block)
                report(f"downloading {name}", done, archive.size)
        except _NetworkError as fault:
            why = str(fault)
        else:
            if done == archive.size:
                return
            why = f"{'more than' if done > archive.size else f'{done:,} of'} its {archive.size:,} bytes came"
    raise DownloadError(
        f"{name} can't be downloaded ({why}): try again, or fetch {archive.url} by hand, put it at {own} and type the "
        "same line"
    )


class _NetworkError(Exception):
    """A network failure, distinguished from errors of writing a file."""


def _blocks(url: str) -> Iterator[bytes]:
    try:
        _check_scheme(url)
        request = Request(url, headers={"User-Agent": "atdiag"})
        with build_opener(_SchemesOnly).open(request, timeout=_SECONDS) as response:
            while block := response.read(MIB):
                yield block
    except HTTPError as fault:
        raise _NetworkError(f"HTTP {fault.code} {fault.reason}") from None
    except (OSError, http.client.HTTPException) as fault:
        reason = str(getattr(fault, "reason", "") or fault).strip() or type(fault).__name__
        raise _NetworkError(reason.splitlines()[0]) from None
