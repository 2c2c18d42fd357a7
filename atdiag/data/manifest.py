"""Scan a data set: read every image once, find broken ones, and write a manifest with each file's sha256.

The manifest is stored in the cache folder in the format of ``sha256sum`` (check with ``sha256sum -c`` in the data set's
folder); a run records its sha256. It is looked up by the files' names, sizes and modification times, so it is never
used for a data set that has changed since.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from atdiag.core import paths, resources
from atdiag.data import image_folders, sources
from atdiag.data.decoding import BrokenImageError, decode
from atdiag.data.files import Files, SplitName, Stored

_CHUNK = 32


@dataclass(frozen=True)
class Scan:
    """The result of scanning a data set.

    broken: path and reason. manifest, sha256: None if an image is broken. mean_size: width and height in pixels, over
    the sound images. counts: images in each split. remarks: surprising properties, with the number of images and the
    first. left_out: a line on the other files in class folders; empty if there are none.
    """

    folder: Path
    counts: dict[str, int]
    classes: int
    broken: tuple[tuple[Path, str], ...]
    mean_size: tuple[float, float]
    manifest: Path | None
    sha256: str | None
    remarks: tuple[tuple[str, int, Path], ...] = ()
    left_out: str = ""


def read(
    splits: Mapping[SplitName, Files],
    report: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> Scan:
    """Read and hash every image of a data set (its splits by ``DataSet.files``), in parallel processes.

    report: progress callback (done, total).
    """
    root = splits["train"].root
    every = [files.stored(i) for files in splits.values() for i in range(len(files))]
    state = _state(splits)
    lines, broken = [], []
    remarked: dict[str, list[Path]] = {}
    width = height = 0
    pool = ProcessPoolExecutor(processes or resources.available_cores())
    try:
        for done, (image, (sha256, size, why, remarks)) in enumerate(
            zip(every, pool.map(_one, every, chunksize=_CHUNK), strict=True), 1
        ):
            if why is None:
                lines.append(f"{sha256}  {image.path.relative_to(root).as_posix()}\n")
                width, height = width + size[0], height + size[1]
                for remark in remarks:
                    remarked.setdefault(remark, []).append(image.path)
            else:
                broken.append((image.path, why))
            report(done, len(every))
    finally:
        pool.shutdown(cancel_futures=True)
    path, digest = None, None
    if not broken:
        text = "".join(lines).encode()
        path, digest = _path(state), hashlib.sha256(text).hexdigest()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(text)
        part.replace(path)
    sound = max(len(lines), 1)
    return Scan(
        root,
        {split: len(files) for split, files in splits.items()},
        len(splits["train"].classes),
        tuple(broken),
        (width / sound, height / sound),
        path,
        digest,
        tuple((remark, len(images), images[0]) for remark, images in sorted(remarked.items())),
        image_folders.left_out(splits.values()),
    )


def recorded(name: str) -> str | None:
    """Return the sha256 of a data set's manifest, if the files are unchanged since.

    None if the set has no files, or if they were not scanned since they last changed.
    """
    if not any(_folder().glob("*.sha256")):  # none was ever written here: don't look at each of a million files
        return None
    if (splits := sources.find(name).files()) is None:
        return None
    path = _path(_state(splits))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _state(splits: Mapping[SplitName, Files]) -> str:
    parts = [str(splits["train"].root), *(files.fingerprint(with_times=True) for files in splits.values())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(state: str) -> Path:
    return _folder() / f"{state[:32]}.sha256"


def _folder() -> Path:
    return paths.cache() / "manifests"


def _one(image: Stored) -> tuple[str, tuple[int, int], str | None, set[str]]:
    """Return an image's sha256 and size, why it is broken (if it is), and remarks."""
    try:
        content = image.read()
    except OSError as fault:
        return "", (0, 0), fault.strerror or str(fault), set()
    sha256 = hashlib.sha256(content).hexdigest()
    remarks: set[str] = set()
    try:
        return sha256, decode(image.path, content, remarks).size, None, remarks
    except BrokenImageError as fault:
        return sha256, (0, 0), fault.why, set()
