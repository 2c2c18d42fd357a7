"""Per-image test predictions of a subject, and how they are stored and read. Imports no torch: tables must be fast."""

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
    """Stored predictions on another test set differ from what was written; the run itself is not affected."""

    def __init__(self, path: Path, cause: object) -> None:
        super().__init__(path, cause)
        self.args = (f"{path} is damaged ({self.cause}): delete it, and it is made again",)


@dataclass(frozen=True)
class Predictions:
    """A subject's per-image predictions, [n] each; ``log_p`` is the log-probability of the true label."""

    prediction: NDArray[np.int32]
    label: NDArray[np.int32]
    cluster: NDArray[np.int32]
    log_p: NDArray[np.float32]

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return float(100 * np.mean(self.prediction == self.label))

    def to_bytes(self, about: Mapping[str, Any] | None = None, among: NDArray[np.int64] | None = None) -> bytes:
        """Serialise as a NumPy archive; for another test set, with metadata (``about``) and classes (``among``)."""
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

    among: the classes whose logits were kept, int32 [k]; empty means all. about: run, test_set, semantics, images,
    fingerprint (of the folder's files, or None) and environment.
    """

    predictions: Predictions
    among: NDArray[np.int32]
    about: dict[str, Any]


MOST = 2**30
"""Maximum bytes of one array in a file: predictions on about 200 million images."""


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a predictions file, after checking their declared sizes before allocating memory.

    Raises FileNotFoundError, and ValueError with a one-line reason for any other fault of the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                _check(archive, entry)
        with np.load(path, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        raise
    except Exception as fault:  # zipfile and NumPy raise many types on a damaged archive
        text = (str(fault) or type(fault).__name__).split("\n", 1)[0]
        raise ValueError(text) from None


def _check(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Raise ValueError unless an entry is an array of its declared length and of at most ``MOST`` bytes."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{entry.filename} is of an unknown version of NumPy's format")
        shape, _, dtype = read_header[version](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size > MOST or file.tell() + size != entry.file_size:
            raise ValueError(f"{entry.filename} is not an array of the size that its header gives")


def correct(run: Run) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Return which of its own test images a finished run got right, and their clusters, [n] each: see :func:`own`."""
    said, label, clusters = own(run)
    return said == label, clusters


def own(run: Run) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return a finished run's predictions on its own test images, their labels and clusters, [n] each.

    Raises DamagedRunError for predictions that can't be read, were changed, or disagree with the run's result.
    """
    _ = run.spec  # raises if the folder's name is not the hash of its spec, before anything else is read
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
    """Read a run's stored predictions on a test set.

    Raises FileNotFoundError if the run was not evaluated on it, or only before the test set's meaning changed, and
    DamagedPredictionsError, which names the file.
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
        raise FileNotFoundError(f"{path} was made from other images than {test_set.name} has now")
    return Elsewhere(Predictions(**parts), among, about)


def is_stored(run: Run, test_set: TestSet) -> bool:
    """Return whether a run's predictions on a test set are stored. Raises DamagedPredictionsError."""
    try:
        read(run, test_set)
    except FileNotFoundError:
        return False
    return True


# --- two runs together -----------------------------------------------------------------------------------------------


def about_pair(run: Run, partner: Run) -> dict[str, Any]:
    """Return what identifies the predictions of two finished runs together: their ids and weights."""
    weights = [one.result().get("files", {}).get("weights.safetensors") for one in (run, partner)]
    return {"run": run.id, "partner": partner.id, "weights": weights}


def read_pair(run: Run, partner: Run) -> Predictions:
    """Read the predictions of two runs together, stored in the first one's directory.

    Raises FileNotFoundError if there are none of these weights, and DamagedPredictionsError, which names the file.
    """
    path = run.ensemble(partner.id)
    try:
        saved = arrays(path)
        parts = {name: saved[name] for name in Predictions.__dataclass_fields__}
        about = json.loads(str(saved[_ABOUT]))
    except (ValueError, KeyError) as fault:
        raise DamagedPredictionsError(path, fault) from None
    if about != about_pair(run, partner):
        raise FileNotFoundError(f"{path} was made from other weights")
    _, label, clusters = own(run)
    if len({array.shape for array in parts.values()}) > 1 or not np.array_equal(parts["label"], label):
        raise DamagedPredictionsError(path, "it is not of the run's test images")
    if not np.array_equal(parts["cluster"], clusters):
        raise DamagedPredictionsError(path, "its parts do not fit each other")
    return Predictions(**parts)


def is_pair_stored(run: Run, partner: Run) -> bool:
    """Return whether the predictions of two runs together are stored. Raises DamagedPredictionsError."""
    try:
        read_pair(run, partner)
    except FileNotFoundError:
        return False
    return True
