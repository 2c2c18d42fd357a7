"""Find the folders of real-image data sets and list their files. Reads folders, never an image.

``ATDIAG_DATA`` (or ``--data-dir``) names the folder of all data sets, each in a folder of its own::

    $ATDIAG_DATA/cifar10/train/<class>/<image>
    $ATDIAG_DATA/cifar10/test/<class>/<image>

A user's own folder (``folder:PATH``) may also have one part only: a folder for each class, with or without ``train``
around them, or images with a table of their labels (:mod:`~atdiag.data.listed`).

Names that begin with a dot are ignored: file systems create them. Everything else in a class folder is an image,
refused, or another file that is counted and named (:mod:`~atdiag.data.endings`). Imports nothing heavy, not even NumPy:
planning asks for the number of classes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from atdiag.core import paths
from atdiag.core.errors import UserError, suggest
from atdiag.core.text import count, printable, shortlist
from atdiag.data import endings, listed, tars
from atdiag.data.catalogue import ANY_FOLDER, FACTS, OWN_TESTS, Facts, TestFacts, is_class
from atdiag.data.files import SPLITS, Files, SplitName


def find(name: str) -> Path:
    """Return the folder of a data set. Raises UserError saying what was looked for, and where."""
    if name.startswith((ANY_FOLDER, tars.TIMM)):
        tars.check(name)
        folder = Path(name.partition(":")[2]).expanduser()
        if not folder.is_dir():
            raise UserError(f"{name}: there is no folder {folder.absolute()}{_near(folder)}")
        return folder.absolute()
    return search(name, FACTS[name].folders)


def _near(folder: Path) -> str:
    """Return a suggestion for a folder that does not exist: another in the same place."""
    try:
        found = suggest(folder.name, (entry.name for entry in folder.absolute().parent.iterdir() if entry.is_dir()))
    except OSError:
        return ""
    return found


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
            return listed.annotated(root, split, annotations)
    if facts is None and (table := _table(root)) is not None:
        return _mostly_read(listed.labelled(root, split, table))
    folder = _split_folder(name, root, split, facts)
    classes = class_folders(name, folder, facts)
    files: list[str] = []
    keys: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    for label, cls in enumerate(classes):
        here, left_out = class_files(folder / cls)
        others += [f"{prefix}{cls}/{file}" for file in left_out]
        files += [f"{prefix}{cls}/{file}" for file in here]
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


def parts(name: str) -> tuple[SplitName, ...]:
    """Return the parts of a data set: training and test images, or the training images alone.

    Only a user's own folder may have one part: the test images are then held out by ``data.split``.
    """
    if not name.startswith(ANY_FOLDER):
        return SPLITS
    root = find(name)
    if (table := _table(root)) is not None:
        return SPLITS if listed.has_test(table) else SPLITS[:1]
    return SPLITS if (root / "train").is_dir() and test_folder(root) is not None else SPLITS[:1]


def test_folder(root: Path) -> str | None:
    """Return the name of the folder of test images in a user's own folder; None if there is none."""
    return next((alias for alias in OWN_TESTS if (root / alias).is_dir()), None)


def _table(root: Path) -> Path | None:
    """Return the table of labels of a user's own folder, a CSV file; None in a folder of class folders.

    Raises UserError if there are several, of which none is ``labels.csv``.
    """
    tables = [name for name in _names(root) if name.lower().endswith(".csv")]
    if not tables or (root / "train").is_dir():
        return None
    if "labels.csv" in tables:
        return root / "labels.csv"
    if _holds_classes(root):  # a table of something else beside them
        return None
    if len(tables) > 1:
        raise UserError(f"{root} holds {len(tables)} tables: {shortlist(tables)}", "call that of the labels labels.csv")
    return root / tables[0]


def fingerprint(name: str) -> str:
    """Return the sha256 of the list of all images and sizes, which identifies ``folder:PATH`` under any path.

    For ``timm:PATH`` it equals that of a folder with the same images.
    """
    return fingerprint_of([read(name, split) for split in parts(name)])


def fingerprint_of(splits: Iterable[Files]) -> str:
    """Return the fingerprint of splits that have already been read."""
    return hashlib.sha256("\n".join(split.fingerprint() for split in splits).encode()).hexdigest()


def class_names(name: str) -> tuple[str, ...]:
    """Return the class folders of a data set's training images, in the order of the labels."""
    root, facts = find(name), FACTS.get(name)
    if name.startswith(tars.TIMM) or (facts is None and _table(root) is not None):
        return read(name, "train").classes
    return class_folders(name, _split_folder(name, root, "train", facts), facts)


def _split_folder(name: str, root: Path, split: SplitName, facts: Facts | None) -> Path:
    wanted = ("train",) if split == "train" else (facts.tests if facts else OWN_TESTS)
    for alias in wanted:
        if (root / alias).is_dir():
            return root / alias
    if facts is None and split == "train":
        if _holds_classes(root):
            return root
        inner = [entry.name for entry in _entries(root) if entry.is_dir()]
        if good := next((one for one in sorted(inner) if _is_data_set(root / one)), None):
            raise UserError(f"{root} has neither a folder 'train' nor classes of images", f"give {root / good}")
        raise UserError(
            f"{root} holds no images in folders of classes, but {shortlist(_names(root))}",
            "give a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, with CLASS/IMAGE, or with images and labels.csv",
        )
    what = "training" if split == "train" else "test"
    raise UserError(
        f"{root} has no folder {_either(wanted)} with the {what} images of {name}",
        f"it holds {shortlist(_names(root))}",
    )


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder holds folders with images in them."""
    inner = (entry.path for entry in _entries(folder) if entry.is_dir())
    return any(endings.is_image(one.name) for path in inner for one in _entries(Path(path)))


def _is_data_set(folder: Path) -> bool:
    """Return whether a folder has one of the layouts of a user's own data set, looking at names only."""
    table = any(one.name.lower().endswith(".csv") for one in _entries(folder))
    return (folder / "train").is_dir() or table or _holds_classes(folder)


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
