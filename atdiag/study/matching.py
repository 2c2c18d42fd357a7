"""Divergence of a run's attention maps from a teacher's: measured once, and stored in the run's directory.

    <run>/match/<first 12 digits of the teacher's sha256>.json
    <run>/match/<id of a fine-tuned run>.json

The Jensen-Shannon divergence in bits (:mod:`atdiag.analysis.similarity`) on some of the run's own test images, by
block, averaged over images, queries and heads; one number for each block and way of matching heads. *Head by head*
compares head i with head i, as attention distillation does. *Heads matched* pairs the heads one to one with the least
mean: the heads of a student that never saw the teacher have no order, so this is its best achievable match. *Heads
nearest* takes the nearest head of the other network for each, and *heads averaged* compares the maps' means over heads.

A student of another size is compared with the maps that pass to it: those of the teacher's blocks that its own are
paired with, with heads and grid brought to its size (:mod:`atdiag.transfer.sizes`). The rules are part of the file's
name, ``<12 digits>-<8 digits of the rules' hash>.json``.

A scratch run is the baseline for every teacher of the same student, so there is one file per teacher. Instead of the
teacher, the fine-tuned teacher of the run's seed can be compared with: a run of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from atdiag.core.errors import UserError
from atdiag.core.runs import Run, digest
from atdiag.core.selection import indices, ranges
from atdiag.core.spec import Data, Network, RunSpec, Teacher, Transfer
from atdiag.data import sources
from atdiag.study.builder import Lab
from atdiag.study.settings import describe

if TYPE_CHECKING:
    from atdiag.analysis.images import ImageSet
    from atdiag.analysis.subjects import Subject

IMAGES = 256
"""Number of test images, evenly spaced in the test set; all images of a smaller set."""
VERSION = 3
"""Version of the measurement and its file; other versions are measured again."""
_AT_A_TIME = 4
"""Students compared with the teacher in one pass."""

_RULES = ("layers", "teacher_layers", "teacher_heads")
"""The fields of a transfer by which a teacher's maps are brought to another size."""

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
    passed: Transfer | None = None
    """For students of another size: a copy of the blocks that are compared, with the rules by which the teacher's maps
    are brought to that size. None: all blocks, each beside the teacher's of the same number."""
    tuned: tuple[RunSpec, ...] = ()
    """The teacher fine-tuned, one run for each seed, if each run is to be compared with that of its own seed."""

    @property
    def name(self) -> str:
        """Name of the measurement, with weights and image size, since teachers from files may share a label."""
        found = str(self.teacher.sha256)[:12] + self.teacher.weights[64:]
        tuned = f", fine-tuned as {', '.join(spec.id[:6] for spec in self.tuned)}" if self.tuned else ""
        size = self.teacher.network.image_size
        return f"maps beside those of {self.teacher.label}{tuned} ({found}, {size} px{self._rules})"

    @property
    def note(self) -> str:
        """What is compared if students are of another size than the teacher; empty if not."""
        if self.passed is None:
            return ""
        blocks = f"their blocks {ranges(self.passed.layers)}" if self.passed.teacher_layers else "all their blocks"
        return (
            f"The students are of another size: the maps of {blocks} are compared with those that pass to them, by the "
            "rules below for blocks, heads and grid."
        )

    def check(self, specs: Sequence[RunSpec]) -> None:
        """Raise UserError if the images on which maps are compared are not here, or a student has another size."""
        for network in dict.fromkeys(spec.network for spec in specs if self.passed is None):
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

        alike: dict[Hashable, list[Run]] = {}
        for run in runs:
            self._check(run)
            alike.setdefault(self._shared(run.spec), []).append(run)
        done = 0
        on_progress(done, len(runs))
        layers = None if self.passed is None else self.passed.layers
        for some in alike.values():
            teacher = self._compared_with(some).to(device)
            pictures = self._pictures(some[0].spec.data, some[0].spec)
            for start in range(0, len(some), _AT_A_TIME):
                part = some[start : start + _AT_A_TIME]
                students = [subjects.of_run(run).to(device) for run in part]
                for run, found in zip(part, similarity(teacher, students, pictures, layers), strict=True):
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
        layers = self._layers(run.spec.network)
        return out | {f"{HEAD_BY_HEAD} block {i}": value for i, value in zip(layers, found["same"], strict=True)}

    def divergences(self, run: Run) -> Divergences | None:
        """Return the divergences by block; None for the teacher itself and without a measurement."""
        if self._is_equal(run.spec):
            return {how: [0.0] * len(self._layers(run.spec.network)) for how in MATCHED_BY}
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
        """Return whether all of a student's compared maps are exactly those that this teacher passes."""
        own, theirs = spec.transfer, spec.teacher
        if own.method != "copy" or theirs is None or theirs.weights != self.teacher.weights:
            return False
        pairs, wanted = dict(zip(own.layers, own.sources, strict=True)), self._layers(spec.network)
        rule = None if self.passed is None else self.passed.teacher_heads
        by_rule = own.teacher_heads == rule and theirs.network.image_size == self.teacher.network.image_size
        as_is = own.tensor == "map" and own.average is None and own.takes_all_heads
        return by_rule and as_is and all(pairs.get(layer) == source for layer, source in wanted.items())

    def _layers(self, student: Network) -> dict[int, int]:
        """Return the student's blocks that are compared, each with the teacher's block."""
        if self.passed is None:
            return {layer: layer for layer in range(student.depth)}
        return dict(zip(self.passed.layers, self.passed.sources, strict=True))

    def _is_measured(self, spec: RunSpec) -> bool:
        is_teacher = spec.init.source == "teacher" and spec.recipe.epochs == 0
        return not is_teacher and not self._is_equal(spec)

    def _check(self, run: Run) -> None:
        tuned = self._tuned(run.spec)
        for one in (run, *([_beside(run, tuned)] if tuned else [])):
            if not one.finished:  # never measure a checkpoint in place of the trained student
                raise ValueError(f"run {one.id} is not finished")
        own, theirs = run.spec.network.heads, self.teacher.network.heads
        if self.passed is None and own != theirs:
            raise UserError(
                f"run {run.id} has {own} heads and {self.teacher.label} {theirs}: they can't be compared head by head"
            )

    def _shared(self, spec: RunSpec) -> Hashable:
        """Return what runs that are compared with the same maps have in common."""
        if self.passed is None:
            return spec.data, self._tuned(spec)
        chosen = spec.seed.data if self.passed.teacher_heads == "different" else None  # on the run's own images
        return spec.data, spec.network, chosen

    def _compared_with(self, runs: Sequence[Run]) -> Subject:
        """Return the subject whose maps those of some runs are compared with."""
        from atdiag.analysis import subjects

        if self.passed is not None:
            return self._passes(runs)
        tuned = self._tuned(runs[0].spec)
        return (
            subjects.loaded(self.teacher, runs[0].spec.data)
            if tuned is None
            else subjects.of_run(_beside(runs[0], tuned))
        )

    def _passes(self, runs: Sequence[Run]) -> Subject:
        """Return a student that copies: the maps that it uses are those that the teacher passes."""
        from atdiag.analysis import subjects
        from atdiag.networks.model import students
        from atdiag.networks.weights import loading
        from atdiag.training import evaluation

        assert self.passed is not None
        spec = runs[0].spec
        copied = RunSpec(
            network=spec.network,
            teacher=self.teacher,
            transfer=self.passed,
            data=spec.data,
            recipe=spec.recipe,
            seed=spec.seed,
        )
        teacher = loading.load(self.teacher)
        record = next((run for run in runs if self._has_chosen(run.spec)), None)
        heads = evaluation.chosen_heads(copied, teacher, record)
        student = students.build(spec.network, 0).eval().requires_grad_(False)  # its weights do not matter
        body = evaluation.Predictor(student, self.passed, teacher, heads=heads)
        return subjects.Subject(f"what {self.teacher.label} passes", body, spec.network, spec.data, spec=copied)

    def _has_chosen(self, spec: RunSpec) -> bool:
        """Return whether a run's record has the heads that differ most, of all blocks that are compared."""
        own, theirs = spec.transfer, spec.teacher
        same = theirs is not None and theirs.weights == self.teacher.weights and own.teacher_heads == "different"
        return same and {*self._layers(spec.network).values()} <= {*own.sources}

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
        own = self.teacher.sha256[:12] + self.teacher.weights[64:].replace("#", "-") + self._rules
        return f"match/{own if tuned is None else tuned.id}.json"

    @property
    def _rules(self) -> str:
        """A hash of the rules for another size, after a hyphen; empty without."""
        return "" if self.passed is None else f"-{digest(self._by())[:8]}"

    def _by(self) -> dict[str, Any]:
        """Return the rules for another size."""
        assert self.passed is not None
        size = self.teacher.network.image_size
        return {**self.passed.model_dump(include=set(_RULES), mode="json"), "teacher_image_size": size}

    def _about(self, run: Run) -> dict[str, Any]:
        """Return what identifies the measurement in a file: a file with other values is taken again."""
        about: dict[str, Any] = {"version": VERSION, "sha256": self.teacher.sha256, "asked": self.images}
        if (tuned := self._tuned(run.spec)) is not None:
            return {**about, "sha256": _beside(run, tuned).result().get("files", {}).get("weights.safetensors")}
        if self.teacher.operation is not None:
            about["operation"] = self.teacher.operation.key
        if self.passed is not None:
            about["passed"] = self._by()
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
        count = len(self._layers(run.spec.network))
        fine = all(len(part) == count and all(map(isfinite, part)) for part in found.values())
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


def beside(lab: Lab, teacher: Teacher, layers: Sequence[int] | None = None) -> Match:
    """Return the measurement of a lab's students against their teacher, by the rules of its settings for other sizes.

    layers: the student's blocks to compare if the experiment chooses them. Of a student with as many blocks as the
    teacher all are compared, else those that take part in the transfer. Raises UserError for blocks that can't be
    paired.
    """
    student, settings = lab.student(teacher), lab.settings.profile.transfer
    theirs = teacher.network
    every: Sequence[int] = range(student.depth)
    if layers is None and (student.depth != theirs.depth or settings.teacher_layers is not None):
        layers = indices(settings.layers, student.depth, "transfer.layers")
    try:
        passed = settings.between(Transfer(method="copy", layers=tuple(layers or every)), student, theirs)
    except ValidationError as fault:
        raise UserError(describe(fault)) from None
    same = (student.grid, student.image_size) == (theirs.grid, theirs.image_size)
    ruled = passed.teacher_layers or passed.teacher_heads or not same
    return Match(teacher, passed=passed if ruled else None)
