"""The state of an unfinished run: enough to go on to the same weights, bit for bit, that it would have had."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from typing import Any

import torch

from atdiag.runs import Run

VERSION = 1


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
    version: int = VERSION


def save(run: Run, checkpoint: Checkpoint) -> None:
    """Write a run's checkpoint, atomically."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    run.write("checkpoint", buffer.getvalue())


def load(run: Run) -> Checkpoint | None:
    """A run's checkpoint, or None if it has none. Raises ValueError for a damaged one, or one of another version.

    Read with ``weights_only``: nothing in the file is executed.
    """
    if not run.checkpoint.exists():
        return None
    try:
        with zipfile.ZipFile(run.checkpoint) as archive:  # torch.load does not look at the checksums in its archive
            if broken := archive.testzip():
                raise zipfile.BadZipFile(broken)
        content = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
        version = content["version"]
        if version == VERSION:
            return Checkpoint(**content)
    except Exception as fault:  # a damaged archive raises whatever it happens to hit
        raise ValueError(
            f"{run.checkpoint} can't be read ({type(fault).__name__}): "
            f"start the run afresh with 'atdiag runs remove {run.id}'"
        ) from fault
    raise ValueError(
        f"{run.checkpoint} was written by another version of atdiag (checkpoint version {version}, this one reads "
        f"{VERSION}): finish the run with that version, or 'atdiag runs remove {run.id}'"
    )
