"""Prepare, train and measure a series. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atdiag.core.errors import UserError
from atdiag.core.progress import OnProgress, Progress
from atdiag.core.text import shortlist
from atdiag.data import sources
from atdiag.networks.registry import teachers
from atdiag.study.protocol import Measurement, Series

if TYPE_CHECKING:
    from atdiag.core.runs import Store
    from atdiag.core.spec import RunSpec


def check_teachers(todo: Sequence[RunSpec]) -> None:
    """Load the published teachers of runs that are to be trained, and try one step of each kind. Takes seconds.

    The shipped miniatures and specimens are covered by the test suite, so nothing is loaded for them. Raises UserError
    if a teacher's file is here but invalid, or if a step would certainly fail.
    """
    tried = [
        spec
        for spec in todo
        if spec.teacher is not None and spec.teacher.sha256 is not None and not teachers.is_shipped(spec.teacher)
    ]
    if tried:
        from atdiag.networks.weights import loading
        from atdiag.training.trial import trial

        trial(tried, loading.load)


def check(series: Sequence[Series], todo: Sequence[RunSpec]) -> None:
    """Check images and weights before training, for the runs to train and for the later measurements.

    Raises UserError if any are missing or invalid.
    """
    for data, network in {spec.data: spec.network for spec in todo}.items():
        sources.find(data).check(data, network)
    studies = [study for one in series for study in one.studies]
    needed = [one for spec in todo for one in (spec.teacher, spec.start) if one is not None]
    named = {one.label: one for one in (*(study.teacher for study in studies), *needed)}
    if plans := [one for one in named.values() if one.sha256 is None]:
        labels = shortlist([teacher.label for teacher in plans], most=6)
        raise UserError(f"the weights of {labels} are not on this machine", teachers.how_to_get(plans[0]))
    for measurement, specs in measurements(series):
        measurement.check(specs)
    check_teachers(todo)


def measurements(series: Sequence[Series]) -> list[tuple[Measurement, list[RunSpec]]]:
    """Return every measurement once, with the runs to measure."""
    found: dict[str, tuple[Measurement, dict[str, RunSpec]]] = {}
    for study in (study for one in series for study in one.studies):
        for measurement in study.measures:
            _, specs = found.setdefault(measurement.name, (measurement, {}))
            specs |= {spec.id: spec for spec in study.specs}
    return [(measurement, list(specs.values())) for measurement, specs in found.values()]


def unmeasured(series: Sequence[Series], store: Store) -> list[RunSpec]:
    """Return the runs that lack a measurement which their studies request, once for each measurement."""
    runs = [(measurement, spec, store.run(spec)) for measurement, specs in measurements(series) for spec in specs]
    return [spec for measurement, spec, run in runs if not run.finished or measurement.missing([run])]


def measure(series: Sequence[Series], store: Store, device: str, on_progress: OnProgress) -> None:
    """Take all missing measurements of the finished runs."""
    for measurement, specs in measurements(series):
        if missing := measurement.missing([store.run(spec) for spec in specs]):
            name = measurement.name

            def report(done: int, total: int, name: str = name) -> None:
                on_progress(Progress(done, total, doing=name))

            measurement.take(missing, device, report)
