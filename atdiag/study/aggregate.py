"""Read finished runs and draw conclusions. Every number comes from run directories."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atdiag.core.runs import Run, Store
from atdiag.data import testsets
from atdiag.networks.registry.specimens import is_specimen
from atdiag.study import chance, judging
from atdiag.study.claims import Judged
from atdiag.study.protocol import Arm, ArmResult, Measurement, Reading, Report, Series, Study
from atdiag.study.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from atdiag.stats.contrasts import Estimate, Outcomes


def read(series: Series, settings: Settings, store: Store, equivalence: float | None = None) -> Reading:
    """Read a series' finished runs, correct for the number of contrasts (Holm), and judge the papers' claims.

    No claim is judged by a specimen, whose fault was planted, or by students of another size than their teacher's.
    equivalence: margin in points; contrasts within it (by
    two one-sided tests) are reported as making no difference.
    Raises ValueError if runs of different semantics would be compared.
    """
    measured = corrected([_measured(study, settings, store) for study in series.studies], equivalence)
    reports = tuple(_concluded(report) for report in measured)
    evidence = [one for one in reports if one.study.of_one_size and not is_specimen(one.study.teacher)]
    judged = tuple(judging.judge_claim(claim, evidence) for claim in series.claims) if evidence else ()
    if series.findings is not None and evidence:
        judged += _findings(series.findings, evidence)
    together = series.verdict(reports) if series.verdict is not None else " ".join(r.verdict for r in reports)
    unsaid = [one.verdict for one in reports if one.undertrained and one.verdict not in together]
    return Reading(series, reports, judged, " ".join([together, *unsaid]))


def _findings(find: Callable[[Sequence[Report]], Sequence[Judged]], reports: Sequence[Report]) -> tuple[Judged, ...]:
    """Verdicts on claims from the studies whose baselines are trained enough."""
    if trained := [report for report in reports if not report.undertrained]:
        return tuple(find(trained))
    return tuple(Judged(one.claim, "not testable here", "", note=chance.UNDERTRAINED) for one in find(reports))


def report(study: Study, settings: Settings, store: Store) -> Report:
    """Read one study's finished runs. Raises ValueError if runs of different semantics would be compared."""
    return read(Series.join([study]), settings, store).reports[0]


def corrected(reports: Iterable[Report], equivalence: float | None = None) -> list[Report]:
    """Correct every contrast's p-value for the number of contrasts in all reports (Holm 1979).

    A contrast that may have no verdict (fewer than three seeds, an undertrained baseline) is left out, and so is one
    between arms that are the same runs, which is zero by construction. The same contrast of the same runs, as when two
    teachers share an arm, counts once.
    """
    from atdiag.stats.contrasts import equivalent, holm

    reports = list(reports)
    every = {report.made_of(name): e for report in reports for name, e in report.estimates if e.decides}
    alone = {made_of: e for made_of, e in every.items() if made_of[1]}
    adjusted = dict(zip(alone, holm([e.p for e in alone.values()]), strict=True))

    def read_among(report: Report) -> Report:
        def read(name: str, estimate: Estimate) -> Estimate:
            tested = equivalence is not None and estimate.scale == "points" and equivalent(estimate, equivalence)
            within = equivalence if tested else None
            return replace(estimate, adjusted=adjusted.get(report.made_of(name)), within=within)

        return _changed(report, read)

    return [read_among(report) for report in reports]


def _concluded(report: Report) -> Report:
    if report.undertrained:
        return replace(report, verdict=chance.verdict(report))
    return replace(report, verdict=" ".join(filter(None, (report.study.verdict(report), _handicap(report)))))


def _measured(study: Study, settings: Settings, store: Store) -> Report:
    """Return a study's numbers, before any conclusions."""
    from atdiag.stats.contrasts import estimate

    if len(versions := {spec.semantics for spec in study.specs}) > 1:
        raise ValueError(f"runs of different semantics can't be compared: {sorted(versions)}")
    arms = [_chosen(arm, store) for arm in study.arms]
    answers = {arm.name: answered(arm, store, study.test_set) for arm in arms}
    measured = {name: said.outcomes for name, said in answers.items()}
    baseline = arms[0].name
    rows = []
    for arm in arms:
        versus = None if arm.name == baseline else estimate(measured, {arm.name: 1, baseline: -1})
        rows.append(_row(arm, answers[arm.name], store, study.measures, versus))
    asked = {c.name: estimate(measured, c.weights, scale=c.scale) for c in study.contrasts}
    reference, warning = None, ""
    if study.reference is not None:
        said = answered(study.reference, store, study.test_set)
        reference = _row(study.reference, said, store, study.measures)
        if study.reference.head is not None:
            warning = study.reference.head.warning(next(iter(said.outcomes.correct.values())))
    stands = chance.footing(measured[baseline], answers[baseline].labels, reference.top1 if reference else None)
    origins = [store.run(arm.specs[0]).result().get("weights") for arm in arms]
    weights = tuple(dict.fromkeys(note for origin in origins if (note := _which_weights(origin))))
    dropped = {arm.name: names for arm in arms if (names := _dropped(store.run(arm.specs[0]).result()))}
    found = Report(
        study,
        settings.profile.name,
        tuple(rows),
        asked,
        reference,
        settings.told,
        dropped,
        weights,
        warning,
        footing=stands,
    )
    return _changed(found, lambda _, one: replace(one, undertrained=True)) if found.undertrained else found


def _chosen(arm: Arm, store: Store) -> Arm:
    """Return an arm with its runs chosen by their accuracy on the validation part, if they are chosen at all.

    Raises ValueError for runs without a validation part.
    """
    if arm.equal is None:
        return arm
    chosen = []
    for some, other in zip(arm.equal.candidates, arm.equal.to, strict=True):
        wanted = _validated(store.run(other))
        distance = {spec.id: abs(_validated(store.run(spec)) - wanted) for spec in some}
        chosen.append(min(some, key=lambda spec: distance[spec.id]))
    return replace(arm, specs=tuple(chosen), equal=None)


def _validated(run: Run) -> float:
    found = run.result().get("validation_top1")
    if not isinstance(found, int | float):
        raise ValueError(f"run {run.id} has no validation part: nothing can be chosen by it")
    return float(found)


def _changed(report: Report, change: Callable[[str, Estimate], Estimate]) -> Report:
    """Return the report with every contrast changed, by name."""
    return replace(
        report,
        rows=tuple(
            row if row.contrast is None else replace(row, contrast=change(row.arm, row.contrast)) for row in report.rows
        ),
        contrasts={name: change(name, one) for name, one in report.contrasts.items()},
    )


@dataclass(frozen=True)
class Answers:
    """Predictions of an arm's runs on n test images."""

    outcomes: Outcomes
    labels: NDArray[np.int32]
    """[n]."""
    classes: tuple[int, ...]
    """Number of different classes that each run predicts."""


def answered(arm: Arm, store: Store, test_set: str | None = None) -> Answers:
    """Return an arm's per-image outcomes by seed, on its own test images or on another test set.

    Those of an ensemble are on its own test images. Raises DamagedRunError for predictions that can't be read or
    disagree with the run's result, FileNotFoundError for a test set that a run was not evaluated on, or an ensemble
    that was not evaluated.
    """
    import numpy as np

    from atdiag.stats.contrasts import Outcomes
    from atdiag.training import predictions

    correct: dict[tuple[int, int], Any] = {}
    label, clusters, classes = np.empty(0, np.int32), np.empty(0, np.int32), []
    for i, spec in enumerate(arm.specs):
        run = store.run(spec)
        if arm.partners:
            both = predictions.read_pair(run, store.run(arm.partners[i]))
            prediction, label, clusters = both.prediction, both.label, both.cluster
        elif test_set is None:
            prediction, label, clusters = predictions.own(run)
        else:
            there = predictions.read(run, testsets.find(test_set)).predictions
            prediction, label, clusters = there.prediction, there.label, there.cluster
        correct[spec.seed.data, spec.seed.model] = prediction == label
        classes.append(len(np.unique(prediction)))
    return Answers(Outcomes(correct, clusters), label, tuple(classes))


def _row(
    arm: Arm, said: Answers, store: Store, measures: Iterable[Measurement], contrast: Estimate | None = None
) -> ArmResult:
    runs = [Run(store.root / spec.id) for spec in arm.every_spec]
    top1 = 100 * sum(float(right.mean()) for right in said.outcomes.correct.values()) / len(arm.specs)
    taken = [{k: v for measure in measures for k, v in measure.numbers(run).items()} for run in runs]
    shared = [name for name in taken[0] if all(name in numbers for numbers in taken)]
    numbers = {name: sum(one[name] for one in taken) / len(taken) for name in shared}
    return ArmResult(
        arm.name, top1, len(arm.specs), tuple(run.id for run in runs), contrast, numbers, tuple(taken), said.classes
    )


def _dropped(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Merge names such as ``blocks.3.attn.x`` over blocks, as ``blocks.*.attn.x``."""
    names = (result["start"] or {}).get("dropped", ())
    return tuple(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))


def _which_weights(origin: Mapping[str, Any] | None) -> str:
    """Return which weights a run's teacher had, if its file holds several."""
    return str((origin or {}).get("note", ""))


def _handicap(report: Report) -> str:
    """Return a note if the teacher is weaker than the baseline."""
    if report.reference is None or not report.weak:
        return ""
    how = ", linear probe" if report.study.reference is not None and report.study.reference.probed else ""
    return (
        f"The teacher itself ({report.reference.top1:.1f} %{how}) is below the baseline ({report.rows[0].top1:.1f} %): "
        "a failure here may be the teacher's weakness and says nothing about its architecture."
    )
