"""Images in tar files, as used on clusters: indexed once by timm's reader, then read as byte ranges.

The only module that uses timm's readers, namely the one for tars. It reads through a whole tar to index it (for
ImageNet 150 GB), so its index is kept in the cache folder, keyed by the tars' names, sizes and modification times. An
image is then read by opening the tar like any file and seeking: no file stays open, and a worker process needs only two
numbers for each image.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from filelock import FileLock

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.resources import GIB, small_file
from atdiag.core.text import printable
from atdiag.data import endings

TIMM = "timm:"
"""``timm:PATH``: ``train.tar`` and ``val.tar`` in PATH, or folders ``train`` and ``val`` with tars in them."""

_ITERABLE = "gives images in an order of its own, and here an image depends on seed, epoch and sample alone"
_OTHERS = {
    "wds": _ITERABLE,
    "tfds": _ITERABLE,
    "hfids": _ITERABLE,
    "torch": "unpickles the files of some data sets, which can run any code in them",
    "hfds": "downloads unasked, and its images need not have the names by which they are chosen and known",
}
_MEND = "give a folder of images as folder:PATH, or of tars as timm:PATH"


class Packed(NamedTuple):
    """An image in a tar: class, file name, tar, and offset in bytes."""

    cls: str
    file: str
    tar: str
    """The tar's path below the folder that holds the split."""
    offset: int
    size: int


class Contents(NamedTuple):
    """What the classes of a split in tars hold: images, and the paths of other files, which are left out."""

    images: list[Packed]
    others: list[str]


def not_read(path: str) -> UserError:
    """Return the error for an image or document in a format that is not read."""
    return UserError(
        f"{printable(path)} is of a format that is not read", "save it as PNG, TIFF or JPEG, or move it away"
    )


def check(name: str) -> None:
    """Raise UserError for paths that timm can read but atdiag can't, or must not."""
    prefix, slash, _ = name.removeprefix(TIMM).partition("/")
    if slash and (why := _OTHERS.get(prefix.lower())):
        raise UserError(f"{name} can't be a data set: timm's reader {prefix}/ {why}", _MEND)


def place(root: Path, stems: Iterable[str]) -> Path | None:
    """Return the tar, or the folder of tars, of a split with one of several names."""
    for stem in stems:
        if (tar := root / f"{stem}.tar").is_file():
            return tar
        if any((root / stem).glob("*.tar")):
            return root / stem
    return None


def contents(path: Path) -> Contents:
    """Return what a split holds, sorted by class and then by name; a class is the folder, or the tar, of an image.

    Hidden files are ignored. Raises UserError for anything but a tar of images in classes, and OSError.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    sizes = {}
    digest = hashlib.sha256()
    for tar in tars:
        status = tar.stat()
        sizes[tar.relative_to(path.parent).as_posix()] = status.st_size
        digest.update(f"{tar.absolute()}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
    kept = paths.cache() / "tars" / f"{digest.hexdigest()[:32]}.json"
    found = _read(kept)
    if found is None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(kept.with_suffix(".lock")):  # of several processes starting at once, one builds the index
                found = _read(kept)
                if found is None:
                    found = _scan(path, tars)
                    part = kept.with_suffix(".part")
                    part.write_text(json.dumps(found._asdict()))
                    part.replace(kept)
        except OSError as fault:
            warnings.warn(f"what is in {path} can't be kept in {kept.parent} ({fault})", stacklevel=2)
            found = _scan(path, tars) if found is None else found
    if any(i.offset < 0 or i.size < 0 or i.offset + i.size > sizes.get(i.tar, 0) for i in found.images):
        raise UserError(f"{path} is truncated, or {kept} is out of date: copy the former again, or remove the latter")
    return found


def _read(kept: Path) -> Contents | None:
    """Read a cached index; None if there is none, or it is unreadable."""
    try:
        document: dict[str, list[Any]] = json.loads(small_file(kept, 4 * GIB))
        rows = document["images"]
        images = [Packed(str(c), str(file), str(tar), int(offset), int(size)) for c, file, tar, offset, size in rows]
        return Contents(images, list(map(str, document["others"])))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _look(file: IO[bytes], size: int, name: str, cls: str) -> Iterator[str]:
    """Read the headers of a tar, and of the tars in it; yield the paths of files in classes that are not images.

    name: the tar's name in paths; cls: the class of files outside folders, "" if none. Raises TarError if a header
    declares more data than there is, for which timm's reader would search endlessly.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} claims to have {member.size:,} bytes")
            if (
                member.isreg()
                and member.name.lower().endswith(".tar")
                and (inner := tar.extractfile(member)) is not None
            ):
                yield from _look(inner, member.size, f"{name}/{member.name}", PurePosixPath(member.name).stem)
            elif not member.isdir() and not (member.isreg() and endings.is_image(member.name)):  # not a link
                path = PurePosixPath(member.name)
                own = path.parent.name or cls
                if own and not own.startswith(".") and not path.name.startswith("."):
                    yield f"{name}/{path}"


def _scan(path: Path, tars: Iterable[Path]) -> Contents:
    from timm.data.readers.reader_image_in_tar import extract_tarinfos

    others: list[str] = []
    try:
        for tar in tars:
            with tar.open("rb") as file:
                alone = tar == path
                name = path.name if alone else f"{path.name}/{tar.name}"
                others += _look(file, tar.stat().st_size, name, "" if alone else tar.stem)
        # timm would store its index beside the tars as a pickle, and unpickle any file of that name. Its reader takes
        # no list of endings, and would skip all images except PNG and JPEG: hence the function below it.
        samples, targets, index, _ = extract_tarinfos(str(path), cache_tarinfo=False, extensions=endings.READ)
    except (tarfile.TarError, ValueError, EOFError, AssertionError, RecursionError) as fault:
        reason = "no image in it" if "unpack" in str(fault) else str(fault) or type(fault).__name__
        raise UserError(f"{path} can't be read as tars of images ({reason})") from None
    if refused := next(filter(endings.is_refused, others), None):
        raise not_read(f"{path.parent}/{refused}")
    found = []
    classes = {label: cls for cls, label in index.items()}
    for (entry, tar, outer), target in zip(samples, targets, strict=True):
        cls, file = str(classes[target]), os.path.basename(entry.name)  # noqa: PTH119
        if cls in ("", "."):
            raise UserError(
                f"{path} holds images outside of any folder, such as {file}", "expected a folder for each class"
            )
        if file.startswith(".") or cls.startswith("."):
            continue
        if not (cls + file).isprintable() or entry.issparse():
            raise UserError(f"{path} holds an image that is not stored as it should be: {cls + '/' + file!r}")
        offset = entry.offset_data + (outer.offset_data if outer is not None else 0)
        name = path.name if tar is None else f"{path.name}/{tar}"
        found.append(Packed(cls, file, name, int(offset), int(entry.size)))
    found.sort()
    if twice := next((a for a, b in pairwise(found) if a[:2] == b[:2]), None):
        raise UserError(f"{path} holds two images {twice.cls}/{twice.file}", "each needs a name of its own")
    return Contents(found, sorted(others))
