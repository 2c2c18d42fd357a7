"""Find the folders of real-image data sets and list their files. Reads folders, never an image.

``ATDIAG_DATA`` (or ``--data-dir``) names the folder of all data sets, each in a folder of its own::

    $ATDIAG_DATA/cifar10/train/<class>/<image>
    $ATDIAG_DATA/cifar10/test/<class>/<image>

Names that begin with a dot are ignored: file systems create them. Everything else in a class folder is an image,
refused, or another file that is counted and named (:mod:`~atdiag.data.endings`). Imports nothing heavy, not even NumPy:
planning asks for the number of classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.resources import GIB, small_file
from atdiag.core.text import count, printable, shortlist
from atdiag.data import endings, tars
from atdiag.data.catalogue import ANY_FOLDER, FACTS, OWN_TESTS, Facts, TestFacts, is_class

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


def find(name: str) -> Path:
    """Return the folder of a data set. Raises UserError saying what was looked for, and where."""
    if name.startswith((ANY_FOLDER, tars.TIMM)):
        tars.check(name)
        folder = Path(name.partition(":")[2]).expanduser()
        if not folder.is_dir():
            raise UserError(f"{name}: there is no folder {folder.absolute()}")
        return folder.absolute()
    return search(name, FACTS[name].folders)


def data_folder(name: str, wanted: tuple[str, ...]) -> Path:
    """Return the folder of all data sets, which need not exist. Raises UserError if none is configured."""
    given = paths.data_dir()
    if given is None:
        raise UserError(
            f"no folder is given for the data set {name}",
            f"give `data_dir` or set {paths.DATA}: the folder that holds {_either(wanted)}",
        )
    return given


def search(name: str, wanted: tuple[str, ...]) -> Path:
    """Return the folder of a set of images with one of several names. Raises UserError like :func:`find`."""
    root = data_folder(name, wanted)
    if root.name in wanted and not any((root / alias).is_dir() for alias in wanted):
        return root  # the data set's own folder was given
    for alias in wanted:
        if (root / alias).is_dir():
            return root / alias
    seen, hint = "which is not a folder", f"choose another with `data_dir` or {paths.DATA}"
    if root.is_dir():
        seen = f"which holds {shortlist(_names(root))}"
        if name in FACTS and FACTS[name].archive is not None:
            hint += f"; 'atdiag data check {name} --download' fetches it"
    raise UserError(f"no data set {name} in {root}, {seen}", f"looked for a folder {_either(wanted)}; {hint}")


def found(name: str) -> Path | None:
    """Return the folder of a data set; None if it is not found."""
    try:
        return find(name)
    except UserError:
        return None


def read(name: str, split: SplitName) -> Files:
    """Return all images of a split. Raises UserError for a folder with an invalid layout."""
    root, facts = find(name), FACTS.get(name)
    if name.startswith(tars.TIMM):
        return _mostly_read(_in_tars(root, split))
    if facts is not None and facts.annotations is not None:
        stem = "train" if split == "train" else "val"
        annotations = root / f"{stem}{facts.annotations}.json"
        if annotations.is_file():
            return _annotated(root, split, annotations)
    folder = _split_folder(name, root, split, facts)
    classes = class_folders(name, folder, facts)
    files: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    prefix = folder.relative_to(root).as_posix()
    for label, cls in enumerate(classes):
        here, left_out = class_files(folder / cls)
        others += [f"{prefix}/{cls}/{file}" for file in left_out]
        files += [f"{prefix}/{cls}/{file}" for file in here]
        keys += [f"{cls}/{file}" for file in here]
        labels += [label] * len(here)
    out = Files(root, split, classes, tuple(files), tuple(keys), tuple(labels), others=tuple(others))
    if empty := [cls for cls, count in zip(classes, out.counts, strict=True) if count == 0]:
        raise UserError(f"{len(empty)} of the {len(classes)} classes in {folder} have no images: {shortlist(empty)}")
    return _mostly_read(out)


def _mostly_read(files: Files) -> Files:
    """Return the files. Raises UserError for a split with more files left out than read."""
    if len(files.others) > len(files):
        raise UserError(
            f"{files.root} has {len(files):,} {files.split} images and {len(files.others):,} other files beside them, "
            f"which would be left out: {shortlist(map(printable, files.others))}",
            f"move those away, or save them as images that are read ({', '.join(endings.READ[:2])} and so on)",
        )
    return files


def left_out(splits: Iterable[Files]) -> str:
    """Describe in one line the files in class folders that are no images; empty if there are none."""
    others = [file for split in splits for file in split.others]
    if not others:
        return ""
    named = shortlist(map(printable, others))
    return f"{count(len(others), 'file')} in class folders left out, no images by the ending: {named}"


def fingerprint(name: str) -> str:
    """Return the sha256 of the list of both splits' images and sizes, which identifies ``folder:PATH`` under any path.

    For ``timm:PATH`` it equals that of a folder with the same images.
    """
    return fingerprint_of([read(name, split) for split in SPLITS])


def fingerprint_of(splits: Iterable[Files]) -> str:
    """Return the fingerprint of splits that have already been read."""
    return hashlib.sha256("\n".join(split.fingerprint() for split in splits).encode()).hexdigest()


def class_names(name: str) -> tuple[str, ...]:
    """Return the class folders of a data set's training images, in the order of the labels."""
    if name.startswith(tars.TIMM):
        return read(name, "train").classes
    root, facts = find(name), FACTS.get(name)
    return class_folders(name, _split_folder(name, root, "train", facts), facts)


def _split_folder(name: str, root: Path, split: SplitName, facts: Facts | None) -> Path:
    wanted = ("train",) if split == "train" else (facts.tests if facts else OWN_TESTS)
    for alias in wanted:
        if (root / alias).is_dir():
            return root / alias
    what = "training" if split == "train" else "test"
    raise UserError(
        f"{root} has no folder {_either(wanted)} with the {what} images of {name}",
        f"it holds {shortlist(_names(root))}",
    )


def class_folders(name: str, folder: Path, facts: Facts | TestFacts | None) -> tuple[str, ...]:
    """Return the names of the class folders in a folder, sorted. Raises UserError if they are not the set's."""
    folders, images = [], 0
    for entry in _entries(folder):
        if entry.is_dir():
            if _UNWRITABLE.search(entry.name):
                raise UserError(f"{folder} has a class whose name is not plain text: {entry.name!r}", "rename it")
            folders.append(entry.name)
        else:
            images += endings.is_image(entry.name) or endings.is_refused(entry.name)
    text = facts.classes_text if facts else "a folder for each class"
    if not folders:
        what = f"{images} images and no folder" if images else "neither folders nor images"
        raise UserError(f"{folder} holds {what}", f"expected {text}")
    if images:
        raise UserError(f"{folder} holds {images} images beside its {len(folders)} folders", f"expected {text}")
    if facts is not None:
        strange = sorted(cls for cls in folders if not is_class(facts, cls))
        if strange:
            raise UserError(
                f"{folder} has folders that are not classes of {name}: {shortlist(strange)}", f"expected {text}"
            )
        if len(folders) != facts.classes:
            raise UserError(f"{folder} has {len(folders)} classes, {name} {facts.classes}", f"expected {text}")
    return tuple(sorted(folders))


def _in_tars(root: Path, split: SplitName) -> Files:
    stems = ("train",) if split == "train" else OWN_TESTS
    place = tars.place(root, stems)
    if place is None:
        wanted = _either(f"{stem}.tar" for stem in stems)
        what = f"{root} has neither {wanted} nor a folder of tars {_either(stems)}"
        raise UserError(what, f"it holds {shortlist(_names(root))}; for images that are files use folder:PATH")
    images, others = tars.contents(place)
    classes = tuple(sorted({image.cls for image in images}))
    label = {cls: i for i, cls in enumerate(classes)}
    keys = tuple(f"{image.cls}/{image.file}" for image in images)
    return Files(
        root,
        split,
        classes,
        tuple(f"{image.tar}/{key}" for image, key in zip(images, keys, strict=True)),
        keys,
        tuple(label[image.cls] for image in images),
        tuple((image.tar, image.offset, image.size) for image in images),
        tuple(others),
    )


def _annotated(root: Path, split: SplitName, path: Path) -> Files:
    """Read iNaturalist's published layout: a JSON file in COCO's format beside the images."""
    try:
        document = json.loads(small_file(path, 4 * GIB))
        names = {int(image["id"]): str(image["file_name"]) for image in document["images"]}
        pairs = sorted((int(a["category_id"]), names[int(a["image_id"])]) for a in document["annotations"])
        ids = sorted(int(category["id"]) for category in document["categories"])
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise UserError(
            f"{path} is not an annotation file of this data set ({type(fault).__name__}: {fault})"
        ) from None
    index = {category: label for label, category in enumerate(ids)}
    if outside := [file for _, file in pairs if file.startswith("/") or ".." in Path(file).parts]:
        raise UserError(f"{path} names files outside of its folder: {shortlist(outside)}")
    if unknown := sorted({str(category) for category, _ in pairs if category not in index}):
        raise UserError(f"{path} has annotations of categories that it does not list: {shortlist(unknown)}")
    out = Files(
        root,
        split,
        tuple(map(str, ids)),
        tuple(file for _, file in pairs),
        tuple(f"{category}/{Path(file).name}" for category, file in pairs),
        tuple(index[category] for category, _ in pairs),
    )
    if empty := [cls for cls, count in zip(out.classes, out.counts, strict=True) if count == 0]:
        raise UserError(f"{len(empty)} of the {len(ids)} categories in {path} have no images: {shortlist(empty)}")
    return out


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder))


_UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that a manifest can't hold: control characters, and bytes that are not text."""


def class_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the images in a class folder, and of its other files; both sorted.

    Raises UserError for an image that would be lost, is unreadable, or is of a format that is not read.
    """
    images: list[str] = []
    others: list[str] = []
    for entry in _entries(folder):
        if endings.is_image(entry.name):
            if not entry.is_file():
                what = "a broken link, a folder or a pipe"
                raise UserError(
                    f"{folder / entry.name} is named like an image, but is not a file ({what})", "remove it"
                )
            if _UNWRITABLE.search(entry.name):
                raise UserError(f"{folder} holds an image whose name is not plain text: {entry.name!r}", "rename it")
            images.append(entry.name)
        elif entry.is_dir():
            others += [f"{entry.name}/{file}" for file in _nested(folder, entry.name)]
        elif endings.is_refused(entry.name):
            raise tars.not_read(str(folder / entry.name))
        else:
            others.append(entry.name)
    return sorted(images), sorted(others)


def _nested(folder: Path, name: str) -> Iterator[str]:
    """Yield the files in a folder within a class folder, none of which may be an image. Raises UserError."""
    for place, _, files in os.walk(folder / name):
        for file in files:
            if endings.is_image(file) or endings.is_refused(file):
                raise UserError(
                    f"{folder} has images in a folder within it, {name}: the images of a class belong in one folder",
                    "move them up, or move that folder away",
                )
            if not file.startswith("."):
                yield (Path(place) / file).relative_to(folder / name).as_posix()


def _either(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
