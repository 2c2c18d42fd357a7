"""After an undecided verdict: lines to type that would settle it, with their cost.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

from atdiag.cli.messages import retyped
from atdiag.core.errors import UserError
from atdiag.core.text import duration, shortlist

if TYPE_CHECKING:
    from atdiag.cli.session import ExperimentSession
    from atdiag.core.runs import Store
    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import Reading, Report, Series
    from atdiag.study.settings import Settings

    Plan = Callable[[Settings], Series]
    """The series of an experiment under some settings."""

_FEASIBLE = 50
"""Seeds that someone may train; contrasts that need more are named, but do not set the number in the line."""
_RISE = 1.0
"""Points of validation accuracy in the last quarter of a training, above which it was too short."""


@dataclass(frozen=True)
class Step:
    """A line to type, with the reason for it and the time that its unfinished runs take."""

    why: str
    line: str
    """Empty if nothing that can be typed would do."""
    seconds: float = 0.0

    def __str__(self) -> str:
        """Format it for the terminal: the reason with the cost, and the line below it."""
        return f"{self.why} (about {duration(self.seconds)}):\n  {self.line}" if self.line else f"{self.why}."

    def record(self) -> dict[str, Any]:
        """Return it as a JSON record."""
        return {"why": self.why, "line": self.line or None, "seconds": round(self.seconds)}


def steps(planned: Plan, reading: Reading, session: ExperimentSession) -> list[Step]:
    """Return what would settle a reading's undecided contrasts: longer training, more seeds, more test images."""
    from atdiag.reports import tables
    from atdiag.stats.contrasts import FEWEST_SEEDS

    make = partial(_step, planned, session)
    if any(report.undertrained for report in reading.reports):
        return [one for one in (_longer(make, "Undertrained: train for longer", session),) if one]
    few = any(e.seeds < FEWEST_SEEDS for report in reading.reports for _, e in report.estimates)
    if few:
        return [make(f"Verdicts begin at {FEWEST_SEEDS} seeds", seeds=FEWEST_SEEDS)]
    open_ = tables.unsettled(reading)
    if not open_:
        return []
    out: list[Step] = []
    numbers = sorted({seeds for _, _, seeds in open_ if seeds is not None})
    if numbers:
        number = max((one for one in numbers if one <= _FEASIBLE), default=numbers[0])
        names = [name for name, _, seeds in open_ if seeds is not None and seeds <= number]
        out.append(make(f"Seeds that would settle {shortlist(names)}", seeds=number))
    if (risen := _risen(reading.reports, session.store)) and (longer := _longer(make, risen, session)):
        out.append(longer)
    out += [_images(planned, name, estimate, session) for name, estimate, seeds in open_ if seeds is None]
    return out


def _step(
    planned: Plan, session: ExperimentSession, why: str, seeds: int | None = None, epochs: int | None = None
) -> Step:
    """Return a step to another number of seeds or epochs. Raises UserError for settings that are not possible."""
    from atdiag.core.spec import Seed
    from atdiag.study.settings import overriding

    settings = session.settings
    options: dict[str, str | None] = {}
    values = _length(session)
    if seeds is not None:
        first = settings.seeds[0].data
        settings = replace(settings, seeds=tuple(Seed(data=i, model=i) for i in range(first, first + seeds)))
        options["--seeds"] = str(seeds)
    if epochs is not None:
        values = _length(session, epochs) or {"recipe.epochs": epochs}
        settings = overriding(settings, values)
    return Step(why, _typed(session, options, values), session.plan(planned(settings).specs).seconds)


def _length(session: ExperimentSession, epochs: int | None = None) -> dict[str, Any]:
    """Return the settings that a budget chose: for other seeds it would choose others, and nothing could be shared.

    epochs: another length. Empty without a budget.
    """
    if session.choice is None:
        return {}
    own, choice = session.settings.overrides, session.choice
    settings = replace(choice, epochs=epochs or choice.epochs).settings
    return {name: value for name, value in settings.items() if name not in own}


def _typed(session: ExperimentSession, options: Mapping[str, str | None], settings: Mapping[str, str | None]) -> str:
    budget = {} if session.choice is None else {"--budget": None, "--gpu": None}
    return retyped({**options, **budget}, settings)


def _longer(make: Callable[..., Step], why: str, session: ExperimentSession) -> Step | None:
    """Return the step to twice the epochs, at least ten; None where the experiment sets them itself."""
    from atdiag.study import chance

    lengths = {recipe.epochs for recipe in session.settings.profile.recipe.values()}
    if len(lengths) > 1:
        return None
    epochs = chance.longer(max(lengths))
    try:
        return make(f"{why}, for {epochs} epochs in place of {max(lengths)}", epochs=epochs)
    except UserError:
        return None


def _risen(reports: tuple[Report, ...], store: Store) -> str:
    """Return a sentence if a baseline's accuracy on the validation part still rose at the end; else empty."""
    for report in reports:
        arm = report.study.arms[0]
        curves = [[line.get("validation_top1") for line in store.run(spec).progress()] for spec in arm.specs]
        images = [store.run(spec).result().get("validation_images") or 0 for spec in arm.specs]
        known = [[float(value) for value in curve if value is not None] for curve in curves]
        length = min(map(len, known))
        if length < 2 or not all(images):
            continue
        last = max(1, length // 4)
        rise = sum(curve[-1] - curve[-1 - last] for curve in known) / len(known)
        share = sum(curve[-1] for curve in known) / len(known) / 100
        error = 100 * sqrt(
            2 * share * (1 - share) / sum(images)
        )  # of a difference, taken as unpaired: on the safe side
        if rise > max(_RISE, 2 * error):
            epochs = "epoch" if last == 1 else f"{last} epochs"
            return (
                f"The training may be too short: in its last {epochs} {arm.name} gained {rise:.1f} points on the "
                "validation part; train for longer"
            )
    return ""


def _images(planned: Plan, name: str, estimate: Estimate, session: ExperimentSession) -> Step:
    """Return the step to all test images, or say how many a contrast needs, where no number of seeds settles it."""
    have = estimate.clusters
    if not estimate.value:
        return Step(f"{name}: the estimate is 0, which nothing would settle", "")
    # |value| >= (1.96 + 0.84) standard errors, of which only the part of the images is left with many seeds.
    needed = ceil((2.8 / abs(estimate.value)) ** 2 * estimate.var_cluster)
    size = f"{estimate.value:+.{estimate.digits}f} {estimate.scale}"
    why = f"{name}: {size} would take more than 1,000 seeds"
    if needed <= have:
        return Step(why, "")
    why += f", or about {needed:,} test images in place of {have:,}"
    if "data.test_per_class" not in session.settings.overrides:
        return Step(why, "")
    from atdiag.study.settings import leaving_out

    every = planned(leaving_out(session.settings, "data.test_per_class"))
    values = {**_length(session), "data.test_per_class": None}
    return Step(f"{why}; all that there are", _typed(session, {}, values), session.plan(every.specs).seconds)
