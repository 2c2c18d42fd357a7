"""How a cohort's training goes, for those who look on: a file in the directory of one of its runs.

``cohort.json`` says where the cohort is trained, how far each run is, and how fast it goes. It is written every few
seconds, and deleted when the training ends; after a kill it stays, and the run's lock tells that nobody trains it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence

from atdiag.core.resources import slurm_job
from atdiag.core.runs import COHORT, Run
from atdiag.training.trainer import RunTrainer

_INTERVAL = 10.0
"""Seconds between two writes: each is one small file on a disk that many trainings may share."""
_SOON = 1.0
"""The same when something else begins: a test may take long, and reports nothing meanwhile."""


class Pulse:
    """Writes the file of one cohort."""

    def __init__(self, device: str) -> None:
        self._where = {"host": socket.gethostname(), "process": os.getpid(), "device": device, "job": slurm_job()}
        self._file: Run | None = None
        self._at = -_INTERVAL
        self._images = 0
        self._doing = ""

    def beat(self, members: Sequence[RunTrainer], images: int, doing: str) -> None:
        """Write the file if it is time to.

        members: the runs that are trained; images: how many have passed through students; doing: such as ``training``.
        """
        now = time.monotonic()
        same = doing == self._doing and members and self._file == members[0].run
        if not members or now - self._at < (_INTERVAL if same else _SOON):
            return
        rate = None
        if doing == self._doing == "training" and now > self._at and self._file is not None:
            rate = round((images - self._images) / (now - self._at), 1)
        left = sum((member.total - member.step) * member.spec.recipe.batch_size for member in members)
        document = {
            **self._where,
            "at": round(time.time(), 1),
            "doing": doing,
            "images_per_second": rate,
            "images_left": left,
            "runs": {member.run.id: [member.step, member.total] for member in members},
        }
        if self._file not in (None, members[0].run):
            self.end()
        self._file = members[0].run
        self._at, self._images, self._doing = now, images, doing
        with contextlib.suppress(OSError):  # a full disk must not end a training that could go on
            self._file.write(COHORT, json.dumps(document))

    def end(self) -> None:
        """Delete the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                (self._file.path / COHORT).unlink(missing_ok=True)
            self._file = None
