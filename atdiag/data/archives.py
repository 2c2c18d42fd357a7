"""Unpack published archives into data set folders. The only module that unpacks anything.

Paths in an archive are never written to. Only regular files that belong to the data set are read, no more of them than
it has, into class folders that :mod:`atdiag.data.catalogue` knows.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray

from atdiag.core.resources import MIB
from atdiag.data import endings
from atdiag.data.catalogue import Facts, is_class
from atdiag.data.decoding import to_picture

Report = Callable[[int], None]
"""Progress callback: (images written)."""

_FOLDED = 3
"""Decompression-bomb limit: at most this many times the archive's size (archives of images barely compress)."""


@dataclass(frozen=True)
class _Cifar:
    """CIFAR's binary version: one record per image, some label bytes (the class is the last) and 3 x 32 x 32 pixels."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    names: str | None = None
    """The file with the class names, in the order of the labels; None: the classes in the catalogue, in their order."""


_CIFAR = {
    "cifar10": _Cifar(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1),
    "cifar100": _Cifar(("train.bin",), ("test.bin",), 2, "fine_label_names.txt"),
}
_PIXELS = 3 * 32 * 32


def unpack(name: str, facts: Facts, path: Path, into: Path, report: Report) -> None:
    """Create a data set's folder from its archive, whose contents are untrusted.

    Raises ValueError for an invalid archive, OSError if the folder can't be written. The caller removes what an invalid
    archive leaves behind.
    """
    most = _FOLDED * path.stat().st_size
    try:
        with tarfile.open(path, "r|gz") as tar:
            if name in _CIFAR:
                _write_cifar(_CIFAR[name], facts, _records(_CIFAR[name], facts, _regular(tar, most)), into, report)
            else:
                _write_images(facts, _regular(tar, most), into, report)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as fault:
        raise ValueError(str(fault)) from None


_Member = tuple[PurePosixPath, int, IO[bytes]]


def _regular(tar: tarfile.TarFile, most: int) -> Iterator[_Member]:
    """Yield name, size and content of each regular file; the total size is checked before each is read."""
    total = 0
    for member in tar:
        total += max(member.size, 0)
        if total > most:
            raise ValueError(f"it unpacks to more than {most:,} bytes")
        if member.isreg() and (content := tar.extractfile(member)) is not None:
            yield PurePosixPath(member.name), member.size, content


def _write_images(facts: Facts, members: Iterator[_Member], into: Path, report: Report) -> None:
    """Write the images of an archive that has the data set's layout, below a top folder of any name."""
    due = {"train": facts.train, facts.tests[0]: facts.test}
    done = 0
    for path, _, content in members:
        split, cls, file = ("", "", "", *path.parts)[-3:]
        image = re.fullmatch(r"[A-Za-z0-9][\w.-]*", file, re.ASCII) and endings.is_image(file)
        if split not in due or not is_class(facts, cls) or not image:
            continue
        due[split] -= 1
        if due[split] < 0:
            raise ValueError(f"it has too many images in {split}")
        folder = into / split / cls
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / file).exists():
            raise ValueError(f"it has {path} twice")
        with (folder / file).open("xb") as out:
            shutil.copyfileobj(content, out)
        done += 1
        report(done)
    if lacking := [f"{count} in {split}" for split, count in due.items() if count]:
        raise ValueError(f"images are missing: {', '.join(lacking)}")


def _records(cifar: _Cifar, facts: Facts, members: Iterator[_Member]) -> dict[str, bytes]:
    """Return the content of the relevant files in CIFAR's archive, by name."""
    wanted: dict[str, int | None] = {cifar.names: None} if cifar.names else {}
    for files, images in ((cifar.train, facts.train), (cifar.test, facts.test)):
        wanted |= dict.fromkeys(files, images // len(files) * (cifar.labels + _PIXELS))
    out = {}
    for path, size, content in members:
        if path.name in wanted:
            need = wanted[path.name]
            if (size > MIB) if need is None else (size != need):
                raise ValueError(f"{path.name} has {size:,} bytes")
            out[path.name] = content.read()
    if lacking := wanted.keys() - out.keys():
        raise ValueError(f"files are missing: {', '.join(sorted(lacking))}")
    return out


def _write_cifar(cifar: _Cifar, facts: Facts, records: dict[str, bytes], into: Path, report: Report) -> None:
    """Write a PNG for each record, numbered in the order of the archive."""
    classes = records[cifar.names].decode("ascii").split() if cifar.names else facts.class_folders.split("|")
    if len(set(classes)) != facts.classes or not all(is_class(facts, cls) for cls in classes):
        raise ValueError(f"it names classes that are not those of {facts.title}")
    done = 0
    for split, files in (("train", cifar.train), (facts.tests[0], cifar.test)):
        for cls in classes:
            (into / split / cls).mkdir(parents=True)
        for number, (label, pixels) in enumerate(_images(records, files, cifar.labels)):
            if label >= len(classes):
                raise ValueError(f"an image of {split} has the label {label}")
            # Uncompressed: file sizes are then the same on every machine, as a spec's fingerprint requires, and each
            # file occupies one disk block anyway.
            to_picture(pixels).save(into / split / classes[label] / f"{number:05d}.png", compress_level=0)
            done += 1
            report(done)


def _images(records: dict[str, bytes], files: tuple[str, ...], labels: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for file in files:
        for record in np.frombuffer(records[file], np.uint8).reshape(-1, labels + _PIXELS):
            yield int(record[labels - 1]), record[labels:].reshape(3, 32, 32)
