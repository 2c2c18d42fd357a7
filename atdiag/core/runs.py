"""A run is a directory, named by its spec's hash. Nothing else holds its state: no database, no index.

    <runs>/<id>/spec.json            the spec
                metrics.jsonl        one line per epoch
                checkpoint           while it trains
                cohort.json          while it trains, in one run of those side by side: where, how far, how fast
                tensorboard/         the same numbers as events
                failure.json         if it stopped at a fault
                weights.safetensors  the trained student
                predictions.npz      per test image: prediction, label, cluster, log-probability of the label
                ood/<set>.npz        the same for other test sets that the finished run was evaluated on
                ensemble/<run>.npz   the same for the mean of its class probabilities and another run's
                result.json          written last and atomically: a run is finished if and only if this file exists

Every file (except events) is written atomically: to a temporary file, flushed, then renamed; this also holds on NFS.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from atdiag.core.errors import UserError
from atdiag.core.resources import GIB, small_file
from atdiag.core.spec import RunSpec

FILES = ("spec.json", "metrics.jsonl", "weights.safetensors", "predictions.npz")
"""The files of a finished run besides its result; none of them changes any more."""

COHORT = "cohort.json"
"""File in a run's directory that says how its cohort's training goes (:mod:`atdiag.training.pulse`)."""

_ID = re.compile(r"[0-9a-f]{16}")

State = Literal["finished", "training", "interrupted", "failed", "new"]


class RunBusyError(RuntimeError):
    """Another process is training this run."""


class DamagedRunError(ValueError):
    """A file of a run differs from what was written; the message says how to restart the run."""

    def __init__(self, path: Path, cause: object) -> None:
        self.path, self.cause = path, str(cause).split("\n", 1)[0]
        super().__init__(
            f"{path} is damaged ({self.cause}): 'atdiag runs remove {path.parent.name}' starts that run afresh"
        )


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def broken_archive(path: Path) -> str | None:
    """Return the fault of a zip archive, such as a checkpoint, by its checksums; None if sound. Raises OSError."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    # zipfile's exception depends on the flipped bit: in the compression method, NotImplementedError.
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, zlib.error) as fault:
        return str(fault) or type(fault).__name__
    return None if bad is None else f"its part {bad} fails its checksum"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object in one of a run's files. Raises DamagedRunError."""
    try:
        out = json.loads(small_file(path))
    except (ValueError, RecursionError) as fault:  # RecursionError: deeply nested brackets
        raise DamagedRunError(path, fault) from None
    if not isinstance(out, dict):
        raise DamagedRunError(path, "it is not a JSON object")
    return out


def digest(document: Any) -> str:
    """Return the sha256 of a JSON document's canonical form."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A run's directory. Constructing this object touches no file."""

    path: Path

    @property
    def id(self) -> str:
        """16 hexadecimal digits: the spec's hash."""
        return self.path.name

    @cached_property
    def spec(self) -> RunSpec:
        """The run's spec. Raises DamagedRunError if the file is not a spec, or not this run's."""
        path = self.path / "spec.json"
        if not path.is_file():
            raise DamagedRunError(path, "it is missing")
        try:
            spec = RunSpec.model_validate_json(small_file(path))
        except ValueError as fault:
            cause = fault.errors()[0]["msg"] if isinstance(fault, ValidationError) else fault
            raise DamagedRunError(path, cause) from None
        if spec.id != self.id:
            raise DamagedRunError(path, f"it describes run {spec.id}")
        return self._with_teacher_here(spec)

    def _with_teacher_here(self, spec: RunSpec) -> RunSpec:
        """Return a spec whose teacher, if it is a run of the same store, is found there although the store was moved.

        The path is part of the teacher's name, which is not hashed.
        """
        if spec.teacher is None or not spec.teacher.name.startswith("run:"):
            return spec
        name, _, file = spec.teacher.name.partition("@")
        here = Run(self.path.absolute().parent / name.removeprefix("run:")).weights
        if Path(file).exists() or not here.exists():
            return spec
        return spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"name": f"{name}@{here}"})})

    @property
    def finished(self) -> bool:
        """Whether the result exists."""
        return os.path.isfile(os.path.join(self.path, "result.json"))  # noqa: PTH113, PTH118 - asked of every run

    @property
    def checkpoint(self) -> Path:
        """Path of an unfinished run's checkpoint."""
        return self.path / "checkpoint"

    @property
    def weights(self) -> Path:
        """Path of the trained student's weights."""
        return self.path / "weights.safetensors"

    @property
    def predictions(self) -> Path:
        """Path of the per-image test predictions."""
        return self.path / "predictions.npz"

    def ood(self, test_set: str) -> Path:
        """Return the path of the per-image predictions on another test set, by its file name."""
        return self.path / "ood" / f"{test_set}.npz"

    def ensemble(self, partner: str) -> Path:
        """Return the path of the per-image test predictions of the run and another one together, by its id."""
        return self.path / "ensemble" / f"{partner}.npz"

    @property
    def state(self) -> State:
        """State of the run."""
        if self.finished:
            return "finished"
        if self._locked():
            return "training"
        if (self.path / "failure.json").exists():
            return "failed"
        return "interrupted" if self.checkpoint.exists() else "new"

    def result(self) -> dict[str, Any]:
        """Return the finished run's result. Raises FileNotFoundError if unfinished, DamagedRunError if damaged."""
        path = self.path / "result.json"
        out: dict[str, Any] = _json(path)
        if out.get("id") != self.id:
            raise DamagedRunError(path, "it is not this run's result")
        if "digest" in out and out.pop("digest") != digest(out):  # older versions recorded none
            raise DamagedRunError(path, "it was changed")
        return out

    def sound(self, path: Path) -> None:
        """Check that one of a finished run's files is the one that was written.

        Raises DamagedRunError if it is missing, or if its sha256 differs from the one in ``result.json`` (older
        versions recorded none there).
        """
        if not path.is_file():
            raise DamagedRunError(path, "it is missing")
        recorded = self.result().get("files")
        if isinstance(recorded, dict) and path.name in recorded and file_sha256(path) != recorded[path.name]:
            raise DamagedRunError(path, "its sha256 is not the one in result.json")

    def failure(self) -> dict[str, Any] | None:
        """Return step and cause of the fault that stopped the run, if any. Raises DamagedRunError."""
        path = self.path / "failure.json"
        return _json(path) if path.exists() else None

    def progress(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``: one for each epoch so far. Raises DamagedRunError."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        if self.finished:
            self.sound(path)
        try:
            return [json.loads(line) for line in small_file(path, GIB).splitlines()]
        except (ValueError, RecursionError) as fault:
            raise DamagedRunError(path, fault) from None

    def write(self, name: str, content: bytes | str) -> None:
        """Write one of the run's files, atomically."""
        write_atomically(self.path / name, content)

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace ``metrics.jsonl`` (a resumed run starts from its checkpoint's lines)."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def fail(self, step: int, cause: str) -> None:
        """Record the fault that stopped the run."""
        self.write("failure.json", json.dumps({"step": step, "cause": cause}))

    def hashes(self) -> dict[str, str]:
        """Return the current sha256 of each of the finished run's files besides its result, by name."""
        return {name: file_sha256(self.path / name) for name in FILES if (self.path / name).is_file()}

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, which marks the run as finished, and remove files that only an unfinished run needs.

        The result records the sha256 of the run's other files, and of itself, so that damage can be detected later.
        """
        document = {"id": self.id, **result, "files": self.hashes()}
        self.write("result.json", json.dumps({**document, "digest": digest(document)}, indent=1))
        for name in ("checkpoint", "failure.json", COHORT):
            (self.path / name).unlink(missing_ok=True)

    def _locked(self) -> bool:
        if not (self.path / "lock").exists():
            return False
        try:
            with FileLock(self.path / "lock", timeout=0):
                return False
        except Timeout:
            return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock for training; the operating system releases it if the process dies.

        Raises RunBusyError if another process holds it.
        """
        lock = FileLock(self.path / "lock")
        try:
            # Wait briefly: a process that only queries this run's state holds the lock for a moment.
            lock.acquire(timeout=0.1, poll_interval=0.01)
        except Timeout:
            raise RunBusyError(f"run {self.id} is being trained by another process") from None
        try:
            self._tidy()
            yield
        finally:
            lock.release()

    def _tidy(self) -> None:
        """Delete temporary files of a killed process, except for spec.json's, which is written without the lock."""
        for path in self.path.glob(".*-*"):
            if not path.name.startswith(".spec.json"):
                path.unlink(missing_ok=True)


def _folders(root: Path) -> list[str]:
    """Return the folders in a folder; none if it does not exist."""
    try:
        with os.scandir(root) as found:
            return [one.path for one in found if one.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


class Store:
    """A folder of runs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, spec: RunSpec) -> Run:
        """Return the run of a spec, which need not exist yet."""
        return Run(self.root / spec.id)

    def create(self, spec: RunSpec) -> Run:
        """Return the run of a spec, after creating its directory.

        Raises ValueError if the directory holds another spec, or if the teacher's weights are not on this machine.
        """
        if spec.teacher is not None and spec.teacher.sha256 is None:
            raise ValueError(f"the weights of {spec.teacher.label} are not on this machine")
        run = self.run(spec)
        run.path.mkdir(parents=True, exist_ok=True)
        if (run.path / "spec.json").exists():
            _ = run.spec
        else:
            run.write("spec.json", spec.model_dump_json(indent=1))
        return run

    def every(self) -> list[Run]:
        """Return all folders that are named like a run, in no order: one request of the file system."""
        return [run for run in map(Run, map(Path, _folders(self.root))) if _ID.fullmatch(run.id)]

    def list(self) -> list[Run]:
        """Return all runs, oldest first, including folders that lost their spec but hold another file of a run."""
        made: dict[str, float] = {}
        for folder in _folders(self.root):
            for name in (*FILES, "result.json", "checkpoint"):  # in the order in which a run writes them
                try:  # mostly the first: one request of the file system for each run
                    made[folder] = os.stat(os.path.join(folder, name)).st_mtime  # noqa: PTH116, PTH118 - for speed
                    break
                except OSError:  # missing, or deleted meanwhile
                    continue
        return [Run(Path(path)) for path in sorted(made, key=lambda path: (made[path], path))]

    def find(self, prefix: str) -> Run:
        """Return the run whose id starts with ``prefix`` (at least 4 digits). Raises UserError unless it is unique."""
        matches = [run for run in self.list() if run.id.startswith(prefix)]
        if len(prefix) < 4:
            problem = f"{prefix!r} is too short for a run's id: give at least 4 of its digits"
        elif not matches:
            problem = f"no run in {self.root} named {prefix!r}"
        elif len(matches) > 1:
            some = ", ".join(run.id for run in matches[:4]) + (" ..." if len(matches) > 4 else "")
            problem = f"{len(matches)} runs in {self.root} have ids that begin with {prefix!r}: {some}"
        else:
            return matches[0]
        # No suggestion of a similar id: a hash that resembles another says nothing.
        where = "" if self.root == Path("runs") else f" with `runs` {shlex.quote(str(self.root))}"
        raise UserError(problem, f"'atdiag runs list'{where} lists them")

    def remove(self, run: Run) -> None:
        """Delete a run's directory. Raises RunBusyError while it is being trained."""
        with run.lock():
            (run.path / "result.json").unlink(missing_ok=True)  # first, so that the remains never pass for finished
            shutil.rmtree(run.path)
