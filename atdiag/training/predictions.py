"""What a subject said of each test image, as it is stored and read. Needs no torch, so that tables are fast."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from atdiag.data import testsets
from atdiag.data.testsets import TestSet
from atdiag.runs import DamagedRunError, Run

_ABOUT = "about"
_AMONG = "among"


class DamagedPredictionsError(DamagedRunError):
    """Stored predictions on another test set are not what was written there; the run itself is none the worse."""

    def __init__(self, path: Path, cause: object) -> None:
        what = str(cause).split("\n", 1)[0]
        ValueError.__init__(self, f"{path} is damaged ({what}): delete it, and it is made again")


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


def read(run: Run, test_set: TestSet) -> Elsewhere:
    """A run's stored predictions on a test set.

    Raises FileNotFoundError where it was not evaluated there, or before the test set's meaning changed, and
    DamagedPredictionsError that names the file.
    """
    path = run.ood(test_set.file)
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in Predictions.__dataclass_fields__}
            about, among = json.loads(str(saved[_ABOUT])), saved[_AMONG]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, ZlibError, NotImplementedError) as fault:
        raise DamagedPredictionsError(path, fault) from None
    if not isinstance(about, dict) or {array.shape for array in arrays.values()} != {(about.get("images"),)}:
        raise DamagedPredictionsError(path, "its parts do not fit each other")
    if (about.get("run"), about.get("test_set")) != (run.id, test_set.name):
        raise DamagedPredictionsError(path, "it is of another run or test set")
    if about.get("semantics") != testsets.SEMANTICS:
        raise FileNotFoundError(f"{path} was made when {test_set.name} meant other images")
    return Elsewhere(Predictions(**arrays), among, about)


def is_stored(run: Run, test_set: TestSet) -> bool:
    """Whether a run's predictions on a test set are stored. Raises DamagedPredictionsError."""
    try:
        read(run, test_set)
    except FileNotFoundError:
        return False
    return True
