"""The state of an unfinished run: enough to go on to the same weights, bit for bit, that it would have had."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atdiag.core.runs import Run, broken_archive
from atdiag.networks.weights import files

VERSION = 2
"""2: the average of the weights beside them, and the run's id."""

_READ = (1, VERSION)
"""Versions that can be gone on from. What a later one added has the value under which nothing changed."""


@dataclass
class Checkpoint:
    """Everything that changes while a run trains. Randomness is no part of it: it is a function of the step."""

    step: int
    """Steps done."""
    student: dict[str, Any]
    optimizer: dict[str, Any]
    seconds: float
    """Training time so far."""
    metrics: list[dict[str, Any]]
    sums: dict[str, float] = field(default_factory=dict)
    """Running sums of the epoch under way."""
    ema: dict[str, Any] | None = None
    """The average of the student's weights, where the recipe keeps one."""
    run: str = ""
    """The id of the run that it is of; version 1 did not say."""
    version: int = VERSION

    @property
    def weights(self) -> dict[str, Any]:
        """What would be tested if the run ended here."""
        return self.student if self.ema is None else self.ema


def save(run: Run, checkpoint: Checkpoint) -> None:
    """Write a run's checkpoint, atomically."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint) | {"run": run.id}, buffer)
    run.write("checkpoint", buffer.getvalue())


def read(path: Path, run: str | None = None) -> Checkpoint:
    """The checkpoint in a file. Raises ValueError, with the reason in one line, for a damaged one or another version's,
    and for one of another run than ``run`` if that is said.

    Read with ``weights_only``: nothing in the file is executed. What it says of its own size is checked before.
    """
    try:
        if files.check(path) != "zip":
            raise ValueError("it is not a checkpoint")
        if broken := broken_archive(path):  # torch.load does not look at the checksums in its archive
            raise zipfile.BadZipFile(broken)
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["version"]
        if version in _READ:
            found = Checkpoint(**content)
            tensors = (*found.student.values(), *(found.ema or {}).values())
            if not isinstance(found.step, int) or not all(isinstance(x, Tensor) for x in tensors):
                raise ValueError("its contents are malformed")
    except Exception as fault:  # a damaged archive raises whatever it happens to hit
        raise ValueError(f"{path} can't be read ({type(fault).__name__})") from fault
    if version not in _READ:
        raise ValueError(
            f"{path} was written by another version of atdiag (checkpoint version {version}, this one reads {VERSION})"
        )
    if run is not None and found.run not in ("", run):
        raise ValueError(f"{path} is the checkpoint of run {found.run}")
    return found


def load(run: Run) -> Checkpoint | None:
    """A run's checkpoint, or None if it has none. Raises ValueError for one that won't do, and says what to do."""
    if not run.checkpoint.exists():
        return None
    try:
        return read(run.checkpoint, run.id)
    except ValueError as fault:
        other = "finish the run with that version, or start" if "another version" in str(fault) else "start"
        raise ValueError(f"{fault}: {other} it afresh with 'atdiag runs remove {run.id}'") from fault
