"""The images of one split as a list of files: names, labels, subsets and fingerprints. Reads sizes, never an image.

Imports nothing heavy, not even NumPy: planning uses it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")


@dataclass(frozen=True)
class Stored:
    """Location of an image: ``size`` bytes of ``file`` from ``offset``; by default the whole file.

    path: the image's name, either the file or, in a tar, "train.tar/cat/0001.jpg".
    """

    path: Path
    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Read the image's bytes. Raises OSError."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Files:
    """The images of one split, sorted by class and then by name.

    files: paths below ``root``; keys: name of each image by class and file ("cat/0001.jpg") wherever it is stored;
    labels: indices into ``classes``; spans: for images in tars, each one's tar (path below ``root``), offset and size;
    others: files in class folders that are not images and are left out (paths below ``root``).
    """

    root: Path
    split: SplitName
    classes: tuple[str, ...]
    files: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    spans: tuple[tuple[str, int, int], ...] = ()
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def counts(self) -> list[int]:
        """Number of images in each class."""
        seen = Counter(self.labels)
        return [seen[label] for label in range(len(self.classes))]

    def keep(self, chosen: Iterable[int]) -> Files:
        """Return a subset of the images, in the same order."""
        rows = sorted(chosen)
        return replace(
            self,
            files=tuple(self.files[i] for i in rows),
            keys=tuple(self.keys[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            spans=tuple(self.spans[i] for i in rows) if self.spans else (),
        )

    def stored(self, index: int) -> Stored:
        """Return the location of an image."""
        path = self.root / self.files[index]
        if not self.spans:
            return Stored(path, path)
        tar, offset, size = self.spans[index]
        return Stored(path, self.root / tar, offset, size)

    def subset(self, per_class: int | None = None, total: int | None = None) -> Files:
        """Return the first ``per_class`` images of each class, or ``total`` of all, by sha256 of their key.

        The selection is therefore the same on every machine, and does not change when images of other classes are
        added.
        """
        if per_class is None and (total is None or total >= len(self)):
            return self
        order = sorted(range(len(self)), key=lambda i: hashlib.sha256(self.keys[i].encode()).digest())
        if per_class is None:
            return self.keep(order[:total])
        taken: Counter[int] = Counter()
        chosen = []
        for i in order:
            taken[self.labels[i]] += 1
            if taken[self.labels[i]] <= per_class:
                chosen.append(i)
        return self.keep(chosen)

    def fingerprint(self, with_times: bool = False) -> str:
        """Return the sha256 of the list of images and sizes in bytes; ``with_times`` includes modification times."""
        digest = hashlib.sha256()
        spans = self.spans or ((file, 0, -1) for file in self.files)
        last = ""
        for (file, _, size), key in zip(spans, self.keys, strict=True):
            if file != last:
                status = os.stat(f"{self.root}/{file}")  # noqa: PTH116 - a Path for each of 60,000 files takes longer
                last = file
            time = f"\t{status.st_mtime_ns}" if with_times else ""
            digest.update(f"{self.split}/{key}\t{status.st_size if size < 0 else size}{time}\n".encode())
        return digest.hexdigest()
