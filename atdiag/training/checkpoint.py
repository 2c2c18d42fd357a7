"""The state of an unfinished run, sufficient to resume it and end with the same weights, bit for bit."""

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
"""Version 2 added the moving average of the weights and the run's id."""

DECODER = "decoder."
"""Prefix of a masked autoencoder's decoder among the student's weights."""

_READ = (1, VERSION)
"""Versions that can be resumed. Fields that a later version added default to the earlier behaviour."""


@dataclass
class Checkpoint:
    """All state that changes while a run trains. Randomness is not part of it, being a function of the step."""

    step: int
    """Steps done."""
    student: dict[str, Any]
    optimizer: dict[str, Any]
    seconds: float
    """Training time so far, in seconds."""
    metrics: list[dict[str, Any]]
    sums: dict[str, float] = field(default_factory=dict)
    """Running sums of the current epoch."""
    ema: dict[str, Any] | None = None
    """The moving average of the student's weights, if the recipe keeps one."""
    run: str = ""
    """The id of the checkpoint's run; empty in version 1."""
    version: int = VERSION

    @property
    def network(self) -> dict[str, Any]:
        """The student's weights, without those of a masked autoencoder's decoder."""
        return {name: tensor for name, tensor in self.student.items() if not name.startswith(DECODER)}

    @property
    def decoder(self) -> dict[str, Any]:
        """The weights of a masked autoencoder's decoder, which are kept beside the student's; empty without one."""
        own = self.student.items()
        return {name.removeprefix(DECODER): tensor for name, tensor in own if name.startswith(DECODER)}

    @property
    def weights(self) -> dict[str, Any]:
        """The weights that would be tested if the run ended here."""
        return self.network if self.ema is None else self.ema


def save(run: Run, checkpoint: Checkpoint) -> None:
    """Write a run's checkpoint, atomically."""
    buffer = io.BytesIO()
    torch.save(vars(checkpoint) | {"run": run.id}, buffer)
    run.write("checkpoint", buffer.getvalue())


def read(path: Path, run: str | None = None) -> Checkpoint:
    """Read a checkpoint from a file.

    Loads with ``weights_only``, so nothing in the file is executed, after checking the sizes that it declares.

    Raises ValueError, with a one-line reason, for a damaged file, another version, or a checkpoint of another run than
    ``run`` if that is given.
    """
    try:
        if files.check(path) != "zip":
            raise ValueError("it is no checkpoint")
        if broken := broken_archive(path):  # torch.load does not verify its archive's checksums
            raise zipfile.BadZipFile(broken)
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["version"]
        if version in _READ:
            found = Checkpoint(**content)
            tensors = (*found.student.values(), *(found.ema or {}).values())
            if not isinstance(found.step, int) or not all(isinstance(x, Tensor) for x in tensors):
                raise ValueError("its parts are not what they should be")
    except Exception as fault:  # torch raises many types on a damaged archive
        raise ValueError(f"{path} can't be read ({type(fault).__name__})") from fault
    if version not in _READ:
        raise ValueError(
            f"{path} was written by another version of atdiag (checkpoint version {version}, this one reads {VERSION})"
        )
    if run is not None and found.run not in ("", run):
        raise ValueError(f"{path} is the checkpoint of run {found.run}")
    return found


def load(run: Run) -> Checkpoint | None:
    """Load a run's checkpoint; None if it has none. Raises ValueError, with a remedy, for one that can't be used."""
    if not run.checkpoint.exists():
        return None
    try:
        return read(run.checkpoint, run.id)
    except ValueError as fault:
        other = "finish the run with that version, or start" if "another version" in str(fault) else "start"
        raise ValueError(f"{fault}: {other} it afresh with 'atdiag runs remove {run.id}'") from fault
