"""The classes of a head's rows: what is known about them, and the rows for the classes of a data set.

The first available source is used:

- a list of classes given by the user (``classes``): a text file with one name per line;
- a list inside the weights: the entry ``classes``, ``class_names``, ``class_to_idx`` or ``idx_to_class`` of a
  checkpoint, or of a safetensors file's metadata (as JSON);
- a list beside them: ``FILE.classes.txt``; ``classes.txt``, ``class_names.txt`` or ``labels.txt`` in the same folder;
  ``label_names`` or ``id2label`` of a ``config.json`` there (timm's and Hugging Face's);
- the data set on which a run or a miniature was trained;
- a head of 1,000 rows is assumed to be ImageNet-1k's if a data set's classes are WordNet ids of ImageNet-1k.

If none is available and the numbers agree, rows are assumed to be in the order of the labels; this is reported, and
checked against chance. A list whose length differs from the head's is ignored, which is reported too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.resources import small_file
from atdiag.core.spec import Data, RunSpec, Teacher
from atdiag.core.text import shortlist
from atdiag.data import image_folders, sources
from atdiag.networks.registry import specimens, stored, teachers
from atdiag.networks.weights import files
from atdiag.networks.weights import sources as weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGENET = "ImageNet's wnids"
OWN = "the training run's own classes"
TYPED = "`classes`"
ASSUMED = "assumed: alphabetical order"

INSIDE = ("classes", "class_names", "class_to_idx", "idx_to_class")
"""Entries of a weight file that list its classes."""
BESIDE = ("classes.txt", "class_names.txt", "labels.txt")
"""Files that list classes, in the folder of the weights."""
_CONFIG, _IN_CONFIG = "config.json", ("label_names", "id2label")

SUSPECT = "no better than chance: the order of the head's classes is probably another; give `classes`"


@dataclass(frozen=True)
class HeadClasses:
    """What is known about the classes of a head."""

    rows: int
    """Number of rows of the head."""
    names: tuple[str, ...] = ()
    """Its classes, row by row; empty if not known."""
    how: str = ""
    """Source of the names: ``the list in /path/labels.txt``."""
    data: Data | None = None
    """The data set on which it was trained, if known."""
    passed_over: str = ""
    """Lists that were found and are not about this head; empty if there are none."""


@dataclass(frozen=True)
class HeadRows:
    """The rows of a head that are a data set's classes."""

    rows: tuple[int, ...] | None
    """Rows in the order of the labels; None if the head lacks the classes."""
    how: str
    """How the rows were determined, or why there are none."""
    passed_over: str = ""
    """Lists that were found and are not about this head; empty if there are none."""

    @property
    def assumed(self) -> bool:
        """Whether the order of the rows is an assumption."""
        return self.how == ASSUMED

    @property
    def note(self) -> str:
        """How the rows were determined, or why there are none, with the lists that were ignored."""
        return "; ".join(filter(None, (self.how, self.passed_over)))

    def warning(self, correct: NDArray[np.bool_]) -> str:
        """Return :data:`SUSPECT` if the rows are assumed and predictions are no better than chance; else "".

        correct: which predictions are right, [n]. Exact one-sided binomial test at 5 % against one of the classes.
        """
        if not self.assumed or self.rows is None or len(self.rows) < 2 or not len(correct):
            return ""
        from scipy.stats import binomtest

        found = binomtest(int(correct.sum()), len(correct), 1 / len(self.rows), alternative="greater")
        return SUSPECT if found.pvalue > 0.05 else ""


# --- what is known of a head ---------------------------------------------------------------------------------------


def of_run(spec: RunSpec) -> HeadClasses:
    """Return what is known about a run's head: its classes are those of the data set."""
    return HeadClasses(spec.network.classes, data=spec.data)


def of_teacher(teacher: Teacher, typed: Path | None = None) -> HeadClasses:
    """Return what is known about a teacher's head. typed: the user's list.

    Raises UserError for a typed list that can't be read, is not as long as the head, or is of a miniature.
    """
    rows = teacher.network.classes
    if teachers.is_shipped(teacher):
        if typed is not None:
            raise UserError(f"the classes of {teacher.label} are known: digits", "leave `classes` out")
        return HeadClasses(rows, data=Data(**weights.metadata(specimens.shipped_file(teacher))["data"]))
    if (run := _run(teacher)) is not None:
        if typed is not None:
            raise UserError(
                f"the classes of {teacher.label} are known: those of {run.data.name}", "leave `classes` out"
            )
        return of_run(run)
    if typed is not None:
        return of_list(typed, rows, teacher.label)
    if teacher.sha256 is None or teachers.is_published(teacher.name):
        return HeadClasses(rows)  # no weights, or weights whose classes the registry knows
    try:
        path = weights.find(teachers.source(teacher.name))
    except weights.WeightsMissingError:  # reading finished runs must not need their teacher's weights
        path = None
    return HeadClasses(rows) if path is None else of_file(path, rows)


def _run(teacher: Teacher) -> RunSpec | None:
    """Return the run of a teacher that is a run's student; None for any other, and if the run is not here."""
    _, file, _ = weights.split_reference(teacher.name)
    run = None if file is None or not teacher.name.startswith(stored.RUN) else stored.run_of(file)
    return None if run is None else run.spec


def of_list(path: Path, rows: int, whose: str) -> HeadClasses:
    """Return the classes in the user's list. Raises UserError if it can't be read or has another length."""
    names = read_list(path)
    if len(names) != rows:
        raise UserError(
            f"`classes` {path} names {len(names)} classes, and the head of {whose} has {rows} rows",
            "name the class of each row, one per line, in the order of the rows",
        )
    return HeadClasses(rows, names, f"{TYPED} {path}")


def read_list(path: Path) -> tuple[str, ...]:
    """Return the names in the user's list. Raises UserError if it can't be read."""
    try:
        return _lines(path)
    except (OSError, ValueError) as fault:
        raise UserError(
            f"`classes` {path} can't be read ({fault})",
            "give a text file with one class per line",
        ) from None


def of_file(path: Path, rows: int) -> HeadClasses:
    """Return the classes listed inside a weight file or beside it, for a head of ``rows`` rows.

    Raises WeightsError for a weight file that can't be read, and UserError for a list that can't be.
    """
    other: list[str] = []
    for place, names in _lists(path):
        if len(names) == rows:
            return HeadClasses(rows, names, f"the list in {place}")
        other.append(f"{place} lists {len(names)} classes, not {rows}, and is ignored")
    return HeadClasses(rows, passed_over="; ".join(other))


def _lists(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return the lists of classes inside and beside a weight file, with their places."""
    found = [(f"{path} ({key})", names) for key, entry in _inside(path).items() if (names := _names(entry))]
    folder = path.parent
    for file in (path.with_name(f"{path.name}.classes.txt"), *(folder / name for name in BESIDE)):
        if file.is_file():
            try:
                found.append((str(file), _lines(file)))
            except (OSError, ValueError) as fault:
                raise UserError(f"{file}, beside the weights, can't be read ({fault})", "fix or remove it") from None
    if (config := folder / _CONFIG).is_file():
        try:
            content = json.loads(small_file(config))
        except (OSError, ValueError, RecursionError):
            content = {}  # written by some other program
        entries = content if isinstance(content, dict) else {}
        found += [(f"{config} ({key})", names) for key in _IN_CONFIG if (names := _names(entries.get(key)))]
    return found


def _inside(path: Path) -> Mapping[str, Any]:
    """Return the entries of a weight file that list classes, by key."""
    kind = files.check(path)
    if kind == "index":
        return {}  # shards have no metadata of the whole
    if kind == "safetensors":
        texts = weights.texts(path)
        return {key: _from_json(texts[key]) for key in INSIDE if key in texts}
    contents = files.outline(path)
    return {key: contents[key] for key in INSIDE if key in contents}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.splitlines()


def _names(entry: Any) -> tuple[str, ...]:
    """Return the names in an entry, in the order of the rows; empty if it is no list of names.

    An entry is a list of names, or a dictionary from names to rows or from rows to names.
    """
    if isinstance(entry, Mapping):
        pairs = [(str(name), row) if isinstance(row, int) else (row, name) for name, row in entry.items()]
        if not all(isinstance(name, str) and re.fullmatch(r"[0-9]{1,7}", str(row)) for name, row in pairs):
            return ()
        by_row = {int(row): name for name, row in pairs}
        if len(by_row) != len(pairs) or set(by_row) != set(range(len(pairs))):
            return ()
        entry = [by_row[row] for row in range(len(pairs))]
    if not isinstance(entry, Sequence) or isinstance(entry, str) or not all(isinstance(name, str) for name in entry):
        return ()
    if all(re.fullmatch(r"LABEL_\d+", name) for name in entry):  # Hugging Face's placeholders for unnamed classes
        return ()
    return tuple(entry)


def _lines(path: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in small_file(path).decode("utf-8-sig").splitlines()]
    return tuple(filter(None, lines))


# --- its rows for a data set ---------------------------------------------------------------------------------------


def match(head: HeadClasses, data: Data) -> HeadRows:
    """Return the rows of a head for a data set's classes.

    Names are compared exactly, then ignoring case; each must occur exactly once.
    """
    data_set = sources.find(data)
    if head.names:
        return _by_name(head, head.names, head.how, data)
    if head.data is not None:
        if _same(head.data, data):
            return HeadRows(tuple(range(head.rows)), OWN)
        if names := _still(head.data):
            return _by_name(head, names, OWN, data)
        if head.data.image_size is None or data.image_size is None:  # embedded: another task in any case
            return HeadRows(None, f"its classes are those of {head.data.name}")
    elif (rows := data_set.head_rows(head.rows)) is not None and data_set.imagenet_rows:
        return HeadRows(rows, IMAGENET, head.passed_over)
    if head.rows == data_set.classes:
        return HeadRows(tuple(range(head.rows)), ASSUMED, head.passed_over)
    if head.rows == 1:
        return HeadRows(None, "its weights have none", head.passed_over)
    return HeadRows(None, f"it has {head.rows:,} rows, and {data.name} {data_set.classes:,} classes", head.passed_over)


def _same(a: Data, b: Data) -> bool:
    """Return whether two specs name the same data set, with the same files if it is a user's own folder."""
    if a.fingerprint is not None and a.fingerprint == b.fingerprint:
        return True
    return a.name == b.name and (a.fingerprint == b.fingerprint or not a.name.startswith(("folder:", "timm:")))


def _still(data: Data) -> tuple[str, ...]:
    """Return the class names of a run's data set; empty if its folder is missing or has changed."""
    data_set = sources.find(data)
    if data_set.imagenet_rows:
        return data_set.class_names
    if data_set.folder() is None:
        return ()
    if data.fingerprint is not None and image_folders.fingerprint(data.name) != data.fingerprint:
        return ()
    return data_set.class_names


def _by_name(head: HeadClasses, names: tuple[str, ...], how: str, data: Data) -> HeadRows:
    data_set = sources.find(data)
    wanted = data_set.class_names
    if not wanted:
        return HeadRows(None, f"the names of the classes of {data.name} are not known here", head.passed_over)
    if len(data_set.imagenet_rows) == len(wanted) and _are_imagenet(names):
        return HeadRows(data_set.imagenet_rows, how, head.passed_over)
    exact, folded = Counter(names), Counter(name.casefold() for name in names)
    place = {name.casefold(): row for row, name in enumerate(names)} | {name: row for row, name in enumerate(names)}
    rows = [place.get(name, place.get(name.casefold())) for name in wanted]
    missing = [name for name, row in zip(wanted, rows, strict=True) if row is None]
    if missing:
        told = f"{len(missing)} of the {len(wanted)} classes of {data.name}: {shortlist(missing)}"
        return HeadRows(None, f"{how} lacks {told}", head.passed_over)
    twice = [name for name in wanted if (exact[name] or folded[name.casefold()]) > 1]
    found = tuple(row for row in rows if row is not None)
    if twice or len(set(found)) < len(found):
        odd = twice or [name for name, row in zip(wanted, found, strict=True) if found.count(row) > 1]
        return HeadRows(None, f"{how} is ambiguous about {shortlist(odd)}", head.passed_over)
    return HeadRows(found, how, head.passed_over)


def _are_imagenet(names: tuple[str, ...]) -> bool:
    """Return whether names are ImageNet-1k's in English, in the order of its labels (as in Hugging Face's configs)."""
    if len(names) != 1000:
        return False
    from timm.data import ImageNetInfo

    facts = ImageNetInfo("imagenet-1k")
    told = [facts.index_to_description(row) for row in range(1000)]
    return all(a.split(",")[0].casefold() == b.split(",")[0].casefold() for a, b in zip(names, told, strict=True))
