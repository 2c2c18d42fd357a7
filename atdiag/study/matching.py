"""Divergence of a run's attention maps from a teacher's: measured once, and stored in the run's directory.

    <run>/match/<first 12 digits of the teacher's sha256>.json

The Jensen-Shannon divergence in bits (:mod:`atdiag.analysis.similarity`) on some of the run's own test images, by
block, averaged over images, queries and heads; two numbers for each block. *Head by head* compares head i with head
i, as attention distillation does. *Heads matched* pairs the heads one to one with the least mean:
the heads of a student that never saw the teacher have no order, so this is its best achievable match.

A scratch run is the baseline for every teacher of the same student, so there is one file per teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError
from atdiag.core.runs import Run, digest
from atdiag.core.spec import Data, RunSpec, Teacher
from atdiag.data import sources

if TYPE_CHECKING:
    from atdiag.analysis.images import ImageSet

IMAGES = 256
"""Number of test images, evenly spaced in the test set; all images of a smaller set."""
VERSION = 2
"""Version of the measurement and its file; other versions are measured again."""
_AT_A_TIME = 4
"""Students compared with the teacher in one pass."""

HEAD_BY_HEAD = "JSD"
HEADS_MATCHED = "JSD heads matched"


@dataclass(frozen=True)
class Match:
    """The measurement of runs' maps against a teacher's (a :class:`~atdiag.study.protocol.Measurement`).

    Not measured: a student that copies all maps of this teacher, for which they are equal by construction, and the
    teacher itself.
    """

    teacher: Teacher
    images: int = IMAGES

    @property
    def name(self) -> str:
        """Name of the measurement, with weights and image size, since teachers from files may share a label."""
        found = str(self.teacher.sha256)[:12] + self.teacher.weights[64:]
        return f"maps beside those of {self.teacher.label} ({found}, {self.teacher.network.image_size} px)"

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError if the images on which maps are compared are not here, or a student has another size."""
        for network in dict.fromkeys(spec.network for spec in specs):
            theirs = self.teacher.network
            own, other = ((one.heads, one.depth, one.grid, one.image_size) for one in (network, theirs))
            if own != other:
                raise UserError(
                    "maps are compared head by head and block by block, which students of another size than "
                    f"{self.teacher.label}'s do not have",
                    "leave `student` out, or give one with its depth, heads and patches",
                )
        for data, network in {s.data: s.network for s in specs}.items():
            sources.find(data).check(data, network)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs without a measurement, or with a damaged file or one of another version."""
        return [run for run in runs if self._is_measured(run.spec) and self._saved(run) is None]

    def take(self, runs: Sequence[Run], device: str, on_progress: Callable[[int, int], None]) -> None:
        """Compare finished runs with the teacher, and store the results.

        Raises ValueError for an unfinished run, UserError for one with other heads or tokens than the teacher's,
        DamagedRunError for one whose weights differ from those recorded in its result.
        """
        from atdiag.analysis import subjects
        from atdiag.analysis.similarity import similarity

        by_data: dict[Data, list[Run]] = {}
        for run in runs:
            self._check(run)
            by_data.setdefault(run.spec.data, []).append(run)
        done = 0
        on_progress(done, len(runs))
        for data, some in by_data.items():
            teacher = subjects.loaded(self.teacher, data).to(device)
            pictures = self._pictures(data, some[0].spec)
            for start in range(0, len(some), _AT_A_TIME):
                part = some[start : start + _AT_A_TIME]
                students = [subjects.of_run(run).to(device) for run in part]
                for run, found in zip(part, similarity(teacher, students, pictures), strict=True):
                    same, optimal = found.matched("same"), found.matched("optimal")
                    self._save(run, found.images, same.tolist(), optimal.tolist())
                done += len(part)
                on_progress(done, len(runs))

    def numbers(self, run: Run) -> dict[str, float]:
        """Return ``JSD`` (head by head, mean over blocks), ``JSD heads matched``, and ``JSD block 0`` and so on.

        Zeros for a student that copies all maps; empty for the teacher itself and without a measurement.
        """
        if self._is_copied(run.spec):
            blocks = matched = [0.0] * run.spec.network.depth
        elif self._is_measured(run.spec) and (saved := self._saved(run)) is not None:
            blocks, matched = saved
        else:
            return {}
        out = {HEAD_BY_HEAD: sum(blocks) / len(blocks), HEADS_MATCHED: sum(matched) / len(matched)}
        return out | {f"{HEAD_BY_HEAD} block {i}": value for i, value in enumerate(blocks)}

    def _is_copied(self, spec: RunSpec) -> bool:
        """Return whether all of a student's maps are exactly this teacher's."""
        own = spec.transfer
        whole = own.layers == tuple(range(spec.network.depth)) and not own.teacher_layers and own.takes_all_heads
        as_is = own.method == "copy" and own.tensor == "map" and own.average is None
        return whole and as_is and spec.teacher is not None and spec.teacher.weights == self.teacher.weights

    def _is_measured(self, spec: RunSpec) -> bool:
        is_teacher = spec.init.source == "teacher" and spec.recipe.epochs == 0
        return not is_teacher and not self._is_copied(spec)

    def _check(self, run: Run) -> None:
        if not run.finished:  # never measure a checkpoint in place of the trained student
            raise ValueError(f"run {run.id} is not finished")
        own, theirs = run.spec.network.heads, self.teacher.network.heads
        if own != theirs:
            raise UserError(
                f"run {run.id} has {own} heads and {self.teacher.label} {theirs}: they can't be compared head by head"
            )

    def _pictures(self, data: Data, spec: RunSpec) -> ImageSet:
        import numpy as np

        from atdiag.analysis import images

        every = images.choose(0, data, spec.network)
        count = min(self.images, len(every))
        return every.reordered(np.arange(count, dtype=np.int64) * len(every) // count)

    def _file(self) -> str:
        if self.teacher.sha256 is None:
            raise ValueError(f"the weights of {self.teacher.label} are not on this machine")
        return f"match/{self.teacher.sha256[:12]}{self.teacher.weights[64:].replace('#', '-')}.json"

    def _about(self) -> dict[str, Any]:
        """Return what identifies the measurement in a file: a file with other values is taken again."""
        about = {"version": VERSION, "sha256": self.teacher.sha256, "asked": self.images}
        if self.teacher.operation is not None:
            about["operation"] = self.teacher.operation.key
        return about if self.teacher.branch == "weights" else {**about, "branch": self.teacher.branch}

    def _save(self, run: Run, images: int, same: list[float], optimal: list[float]) -> None:
        (run.path / "match").mkdir(exist_ok=True)
        content = {**self._about(), "teacher": self.teacher.label, "images": images, "digest": digest([same, optimal])}
        run.write(self._file(), json.dumps({**content, "head_by_head": same, "heads_matched": optimal}, indent=1))

    def _saved(self, run: Run) -> tuple[list[float], list[float]] | None:
        """Read the measurement by block, head by head and with heads matched; None without a valid file of it."""
        path = run.path / self._file()
        try:
            content = json.loads(path.read_text())
            if {name: content[name] for name in self._about()} != self._about():
                return None
            found = [[float(value) for value in content[name]] for name in ("head_by_head", "heads_matched")]
            if content["digest"] != digest(found):  # a number was changed: measure again
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        fine = all(len(part) == run.spec.network.depth and all(map(isfinite, part)) for part in found)
        return (found[0], found[1]) if fine else None
