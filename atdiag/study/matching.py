"""Divergence of a run's attention maps from a teacher's: measured once, and stored in the run's directory.

    <run>/match/<first 12 digits of the teacher's sha256>.json
    <run>/match/<id of a fine-tuned run>.json

The Jensen-Shannon divergence in bits (:mod:`atdiag.analysis.similarity`) on some of the run's own test images, by
block, averaged over images, queries and heads; one number for each block and way of matching heads. *Head by head*
compares head i with head i, as attention distillation does. *Heads matched* pairs the heads one to one with the least
mean: the heads of a student that never saw the teacher have no order, so this is its best achievable match. *Heads
nearest* takes the nearest head of the other network for each, and *heads averaged* compares the maps' means over heads.

A scratch run is the baseline for every teacher of the same student, so there is one file per teacher. Instead of the
teacher, the fine-tuned teacher of the run's seed can be compared with: a run of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any, get_args

from atdiag.core.errors import UserError
from atdiag.core.runs import Run, digest
from atdiag.core.spec import Data, RunSpec, Teacher
from atdiag.data import sources

if TYPE_CHECKING:
    from atdiag.analysis.images import ImageSet

IMAGES = 256
"""Number of test images, evenly spaced in the test set; all images of a smaller set."""
VERSION = 3
"""Version of the measurement and its file; other versions are measured again."""
_AT_A_TIME = 4
"""Students compared with the teacher in one pass."""

HEAD_BY_HEAD = "JSD"
HEADS_MATCHED = "JSD heads matched"

MATCHED_BY = {
    "same": "head_by_head",
    "optimal": "heads_matched",
    "best": "heads_nearest",
    "averaged": "heads_averaged",
}
"""Each way of matching heads (``analysis.similarity.MATCHINGS``) -> its name in a file."""

PRE_TRAINED, TUNED = "pre-trained", "fine-tuned"
"""The two states of a teacher whose maps students' are compared with."""

Divergences = Mapping[str, Sequence[float]]
"""Way of matching heads -> divergence by block."""


@dataclass(frozen=True)
class Match:
    """The measurement of runs' maps against a teacher's (a :class:`~atdiag.study.protocol.Measurement`).

    Not measured: a student whose maps are equal by construction, since it copies all of this teacher's or is the
    fine-tuned run itself, and the teacher itself.
    """

    teacher: Teacher
    images: int = IMAGES
    tuned: tuple[RunSpec, ...] = ()
    """The teacher fine-tuned, one run for each seed, if each run is to be compared with that of its own seed."""

    @property
    def name(self) -> str:
        """Name of the measurement, with weights and image size, since teachers from files may share a label."""
        found = str(self.teacher.sha256)[:12] + self.teacher.weights[64:]
        tuned = f", fine-tuned as {', '.join(spec.id[:6] for spec in self.tuned)}" if self.tuned else ""
        return f"maps beside those of {self.teacher.label}{tuned} ({found}, {self.teacher.network.image_size} px)"

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
        from atdiag.analysis.similarity import Matching, similarity

        alike: dict[tuple[Data, RunSpec | None], list[Run]] = {}
        for run in runs:
            self._check(run)
            alike.setdefault((run.spec.data, self._tuned(run.spec)), []).append(run)
        done = 0
        on_progress(done, len(runs))
        for (data, tuned), some in alike.items():
            own = subjects.loaded(self.teacher, data) if tuned is None else subjects.of_run(_beside(some[0], tuned))
            teacher, pictures = own.to(device), self._pictures(data, some[0].spec)
            for start in range(0, len(some), _AT_A_TIME):
                part = some[start : start + _AT_A_TIME]
                students = [subjects.of_run(run).to(device) for run in part]
                for run, found in zip(part, similarity(teacher, students, pictures), strict=True):
                    matchings = get_args(Matching)
                    self._save(run, found.images, {how: found.matched(how).tolist() for how in matchings})
                done += len(part)
                on_progress(done, len(runs))

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return ``JSD`` (head by head, mean over blocks), ``JSD heads matched``, and ``JSD block 0`` and so on.

        Zeros for maps that are equal by construction; empty for the teacher itself and without a measurement.
        """
        found = self.divergences(run)
        if found is None:
            return {}
        out = {HEAD_BY_HEAD: mean(found["same"]), HEADS_MATCHED: mean(found["optimal"])}
        return out | {f"{HEAD_BY_HEAD} block {i}": value for i, value in enumerate(found["same"])}

    def divergences(self, run: Run) -> Divergences | None:
        """Return the divergences by block; None for the teacher itself and without a measurement."""
        if self._is_equal(run.spec):
            return {how: [0.0] * run.spec.network.depth for how in MATCHED_BY}
        return self._saved(run) if self._is_measured(run.spec) else None

    def _tuned(self, spec: RunSpec) -> RunSpec | None:
        """Return the fine-tuned run of a run's seed; None if runs are compared with the teacher."""
        if not self.tuned:
            return None
        found = [one for one in self.tuned if one.seed == spec.seed]
        if not found:
            raise ValueError(f"no fine-tuned run has the seed of run {spec.id}")
        return found[0]

    def _is_equal(self, spec: RunSpec) -> bool:
        """Return whether a student's maps are those that it is compared with by construction."""
        return spec in self.tuned if self.tuned else self._is_copied(spec)

    def _is_copied(self, spec: RunSpec) -> bool:
        """Return whether all of a student's maps are exactly this teacher's."""
        own = spec.transfer
        whole = own.layers == tuple(range(spec.network.depth)) and not own.teacher_layers and own.takes_all_heads
        as_is = own.method == "copy" and own.tensor == "map" and own.average is None
        return whole and as_is and spec.teacher is not None and spec.teacher.weights == self.teacher.weights

    def _is_measured(self, spec: RunSpec) -> bool:
        is_teacher = spec.init.source == "teacher" and spec.recipe.epochs == 0
        return not is_teacher and not self._is_equal(spec)

    def _check(self, run: Run) -> None:
        tuned = self._tuned(run.spec)
        for one in (run, *([_beside(run, tuned)] if tuned else [])):
            if not one.finished:  # never measure a checkpoint in place of the trained student
                raise ValueError(f"run {one.id} is not finished")
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

    def _file(self, run: Run) -> str:
        if self.teacher.sha256 is None:
            raise ValueError(f"the weights of {self.teacher.label} are not on this machine")
        tuned = self._tuned(run.spec)
        name = self.teacher.sha256[:12] + self.teacher.weights[64:].replace("#", "-") if tuned is None else tuned.id
        return f"match/{name}.json"

    def _about(self, run: Run) -> dict[str, Any]:
        """Return what identifies the measurement in a file: a file with other values is taken again."""
        about = {"version": VERSION, "sha256": self.teacher.sha256, "asked": self.images}
        if (tuned := self._tuned(run.spec)) is not None:
            return {**about, "sha256": _beside(run, tuned).result().get("files", {}).get("weights.safetensors")}
        if self.teacher.operation is not None:
            about["operation"] = self.teacher.operation.key
        return about if self.teacher.branch == "weights" else {**about, "branch": self.teacher.branch}

    def _save(self, run: Run, images: int, found: Divergences) -> None:
        (run.path / "match").mkdir(exist_ok=True)
        by_name = {MATCHED_BY[how]: list(values) for how, values in found.items()}
        about = {**self._about(run), "teacher": self.teacher.label, "images": images}
        content = {**about, "digest": digest(list(by_name.values())), **by_name}
        run.write(self._file(run), json.dumps(content, indent=1))

    def _saved(self, run: Run) -> Divergences | None:
        """Read the measurement; None without a valid file of it."""
        path = run.path / self._file(run)
        try:
            content, about = json.loads(path.read_text()), self._about(run)
            if {name: content[name] for name in about} != about:
                return None
            found = {how: [float(value) for value in content[name]] for how, name in MATCHED_BY.items()}
            if content["digest"] != digest(list(found.values())):  # a number was changed: measure again
                return None
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        fine = all(len(part) == run.spec.network.depth and all(map(isfinite, part)) for part in found.values())
        return found if fine else None


def column(reference: str, matching: str = "optimal") -> str:
    """Return the column of a divergence; that of heads matched one to one is the one in tables."""
    return f"JSD {reference}" + ("" if matching == "optimal" else f" ({matching})")


@dataclass(frozen=True)
class Agreement(Match):
    """Divergences from one state of the teacher under every matching of heads, mean over blocks."""

    def numbers(self, run: Run) -> Mapping[str, float]:
        """Return a number for each matching; none for the teacher itself and without a measurement."""
        found = self.divergences(run)
        reference = TUNED if self.tuned else PRE_TRAINED
        return {} if found is None else {column(reference, how): mean(found[how]) for how in ("optimal", *MATCHED_BY)}


def _beside(run: Run, spec: RunSpec) -> Run:
    """Return another run of the store that holds a run."""
    return Run(run.path.parent / spec.id)
