"""What a subject said of each test image, as it is stored and read. Needs no torch, so that tables are fast."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atdiag.core.runs import DamagedRunError, Run
from atdiag.data import testsets
from atdiag.data.testsets import TestSet

_ABOUT = "about"
_AMONG = "among"


class DamagedPredictionsError(DamagedRunError):
    """Stored predictions on another test set are not what was written there; the run itself is none the worse."""

    def __init__(self, path: Path, cause: object) -> None:
        super().__init__(path, cause)
        self.args = (f"{path} is damaged ({self.cause}): delete it, and it is made again",)


@dataclass(frozen=True)
class Predictions:
    """What a subject said of each test image, [n] each; ``log_p`` is the log-probability of the true label."""

    prediction: NDArray[np.int32]
    label: NDArray[np.int32]
    cluster: NDArray[np.int32]
    log_p: NDArray[np.float32]

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return float(100 * np.mean(self.prediction == self.label))

    def to_bytes(self, about: Mapping[str, Any] | None = None, among: NDArray[np.int64] | None = None) -> bytes:
        """As a NumPy archive; of another test set with what is known ``about`` it and the classes chosen ``among``."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if about is not None:
            arrays[_ABOUT] = np.array(json.dumps(about))
            arrays[_AMONG] = np.array([] if among is None else among, np.int32)
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()


@dataclass(frozen=True)
class Elsewhere:
    """A run's predictions on a test set other than its own.

    ``among``: the classes whose logits were kept, int32 [k]; empty: all. ``about``: run, test_set, semantics,
    images, fingerprint (of the folder's files, or None) and environment.
    """

    predictions: Predictions
    among: NDArray[np.int32]
    about: dict[str, Any]


MOST = 2**30
"""Bytes that one array of a file may take: predictions on 200 million images."""


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file of predictions. What it says of itself is checked before room is made for anything.

    Raises FileNotFoundError, and ValueError, with the reason in one line, for whatever is wrong with the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                _check(archive, entry)
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        raise
    except Exception as fault:  # a damaged archive raises whatever it happens to hit
        text = (str(fault) or type(fault).__name__).split("\n", 1)[0]
        raise ValueError(text) from None


def _check(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raise ValueError unless an entry is an array that is as long as it says, and no longer than is sensible."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{entry.filename} is of an unknown version of NumPy's format")
        shape, _, dtype = read_header[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size > MOST or file.tell() + size != entry.file_size:
            raise ValueError(f"{entry.filename} is no array of the size that it says")


def correct(run: Run) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Which of its own test images a finished run got right, and their clusters, [n] each: see :func:`own`."""
    said, label, clusters = own(run)
    return said == label, clusters


def own(run: Run) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """What a finished run said of its own test images, their labels and their clusters, [n] each.

    Raises DamagedRunError for predictions that can't be read, were changed, or disagree with the run's result.
    """
    _ = run.spec  # of a run that is not what its folder is named by nothing is read
    run.sound(run.predictions)
    try:
        saved = arrays(run.predictions)
        said, label, clusters = (saved[name] for name in ("prediction", "label", "cluster"))
    except (ValueError, KeyError) as fault:
        raise DamagedRunError(run.predictions, fault) from None
    if len({array.shape for array in saved.values()}) > 1 or label.ndim != 1 or not len(label):
        raise DamagedRunError(run.predictions, "its parts do not fit each other")
    top1 = run.result().get("top1")
    if not isinstance(top1, int | float) or not abs(100 * (said == label).mean() - top1) <= 1e-6:
        raise DamagedRunError(run.predictions, "it does not agree with result.json")
    return said, label, clusters


def read(run: Run, test_set: TestSet) -> Elsewhere:
    """A run's stored predictions on a test set.

    Raises FileNotFoundError where it was not evaluated there, or before the test set's meaning changed, and
    DamagedPredictionsError that names the file.
    """
    path = run.ood(test_set.file)
    try:
        saved = arrays(path)
        parts = {name: saved[name] for name in Predictions.__dataclass_fields__}
        about, among = json.loads(str(saved[_ABOUT])), saved[_AMONG]
    except (ValueError, KeyError) as fault:
        raise DamagedPredictionsError(path, fault) from None
    if not isinstance(about, dict) or {array.shape for array in parts.values()} != {(about.get("images"),)}:
        raise DamagedPredictionsError(path, "its parts do not fit each other")
    if (about.get("run"), about.get("test_set")) != (run.id, test_set.name):
        raise DamagedPredictionsError(path, "it is of another run or test set")
    if about.get("semantics") != testsets.SEMANTICS:
        raise FileNotFoundError(f"{path} was made when {test_set.name} meant other images")
    return Elsewhere(Predictions(**parts), among, about)


def is_stored(run: Run, test_set: TestSet) -> bool:
    """Whether a run's predictions on a test set are stored. Raises DamagedPredictionsError."""
    try:
        read(run, test_set)
    except FileNotFoundError:
        return False
    return True
