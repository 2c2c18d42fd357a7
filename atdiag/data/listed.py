"""Images that a file lists: iNaturalist's annotations, and a user's own table of labels. Reads no image.

A table is a CSV file in the folder of the images, with a first line that names its columns:

==========  ==========================================================================================================
column      holds
==========  ==========================================================================================================
``file``    an image's path below the folder (also named ``filename``, ``file_name``, ``image`` or ``path``)
``label``   the name of its class (also named ``class`` or ``class_name``)
``split``   if there is one: ``train``, or ``val``, ``validation`` or ``test`` for a test image
==========  ==========================================================================================================

Further columns are ignored. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from atdiag.core.errors import UserError
from atdiag.core.resources import GIB, small_file
from atdiag.core.text import printable, shortlist
from atdiag.data import endings, tars
from atdiag.data.catalogue import OWN_TESTS
from atdiag.data.files import Files, SplitName

COLUMNS = {
    "file": ("file", "filename", "file_name", "image", "path"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
}
"""What a table's column holds -> its possible names, ignoring case."""

_UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def has_test(table: Path) -> bool:
    """Return whether a table says which images are test images. Raises UserError for a file that is no such table."""
    columns, _ = _rows(table)
    return "split" in columns


def labelled(root: Path, split: SplitName, table: Path) -> Files:
    """Return the images of a split in a table of labels; without a column ``split``, all of them.

    Raises UserError for a file that is no such table, and for images that are not there, or not below the folder.
    """
    columns, rows = _rows(table)
    known = ("train", *OWN_TESTS)
    found: dict[str, str] = {}
    classes: set[str] = set()
    for line, row in enumerate(rows, 2):
        file, label = (row[columns[what]].strip() for what in ("file", "label"))
        if not label or _UNWRITABLE.search(label) or "/" in label:
            raise UserError(f"{table}, line {line}: {label!r} is not the name of a class", "write plain text without /")
        classes.add(label)
        part = row[columns["split"]].strip().lower() if "split" in columns else "train"
        if part not in known:
            raise UserError(f"{table}, line {line}: the split {part!r} is unknown", f"write {' or '.join(known)}")
        if file in found:
            raise UserError(f"{table}, line {line}: {printable(file)} is listed twice", "leave one line out")
        found[file] = "" if (part == "train") != (split == "train") else label
    _check_files(root, table, found)
    order = sorted((label, file) for file, label in found.items() if label)
    names = tuple(sorted(classes))
    index = {name: i for i, name in enumerate(names)}
    if empty := classes - {label for label, _ in order}:
        what = "training" if split == "train" else "test"
        raise UserError(f"{table} lists no {what} image of {shortlist(sorted(empty))}", "list one, or leave it out")
    return Files(
        root,
        split,
        names,
        tuple(file for _, file in order),
        tuple(f"{label}/{file}" for label, file in order),
        tuple(index[label] for label, _ in order),
        others=tuple(_unlisted(root, found)) if split == "train" else (),
    )


def _rows(table: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return a table's columns, as what each holds -> its name, and its rows."""
    status = table.stat()
    return _read(table, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4)
def _read(table: Path, _size: int, _time: int) -> tuple[dict[str, str], list[dict[str, str]]]:
    try:
        text = small_file(table, GIB).decode("utf-8-sig")
    except ValueError as fault:
        raise UserError(f"{table} can't be read as a table of labels ({fault})", "save it as CSV in UTF-8") from None
    first = text.partition("\n")[0]
    mark = next((mark for mark in (",", ";", "\t") if mark in first), ",")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        names = list(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as fault:
        raise UserError(f"{table} can't be read as a table of labels ({fault})", "save it as CSV") from None
    columns = _columns(names)
    if missing := [what for what in ("file", "label") if what not in columns]:
        told = " and no column ".join(map(repr, missing))
        raise UserError(
            f"{table} has no column {told}, but {shortlist(map(printable, names))}",
            "its first line names the columns: file,label",
        )
    for line, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{table}, line {line} has another number of columns than the first line", "complete it")
    if not rows:
        raise UserError(f"{table} lists no image", "write a line for each: file,label")
    return columns, rows


def _columns(names: list[str]) -> dict[str, str]:
    lower: Mapping[str, str] = {name.strip().lower(): name for name in reversed(names)}
    found = {what: next((lower[one] for one in known if one in lower), None) for what, known in COLUMNS.items()}
    return {what: name for what, name in found.items() if name is not None}


def _check_files(root: Path, table: Path, found: Mapping[str, str]) -> None:
    """Raise UserError for a listed file that is not an image below the folder."""
    for file in found:
        if Path(file).is_absolute() or ".." in Path(file).parts or _UNWRITABLE.search(file):
            raise UserError(f"{table} lists {printable(file)!r}", f"write paths below {root}")
        if endings.is_refused(file):
            raise tars.not_read(file)
        if not endings.is_image(file):
            raise UserError(f"{table} lists {printable(file)!r}, which has no image's ending", "write it as ant.jpg")
    if gone := [file for file in found if not (root / file).is_file()]:
        raise UserError(
            f"{len(gone)} of the {len(found)} images in {table} are not in {root}: {shortlist(map(printable, gone))}",
            f"write paths below {root}",
        )


def _unlisted(root: Path, found: Mapping[str, str]) -> list[str]:
    """Return the images that lie beside listed ones and are not listed."""
    folders = sorted({(root / file).parent for file in found})
    beside = (one.relative_to(root).as_posix() for folder in folders for one in folder.iterdir())
    return sorted(path for path in beside if endings.is_image(path) and not _hidden(path) and path not in found)


def _hidden(path: str) -> bool:
    return Path(path).name.startswith(".")


def annotated(root: Path, split: SplitName, path: Path) -> Files:
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
