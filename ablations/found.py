"""What a finished study found, in words of a fixed vocabulary: what a calibration compares with what was planted.

The words follow from the contrasts that the commands print, with their correction for several contrasts, and from
nothing else; ``rescue`` says the same in its verdict.
"""

from __future__ import annotations

from atdiag.study.protocol import Report
from atdiag.study.verdicts import outcome

TRANSFERS = "transfers"
FAILS = "fails"
UNDECIDED = "undecided"
WEAK = "weak teacher: nothing can be said"
NOT_RESCUED = "fails: no component rescues"
RESCUED_TOGETHER = "fails: the components together"


def fails_by(*components: str) -> str:
    """Return the word for a failure that each of these components alone turns into a gain."""
    return f"fails: {', '.join(sorted(components))}"


def names(verdict: str) -> bool:
    """Return whether a verdict names the components that reverse a failure one by one."""
    return verdict.startswith(f"{FAILS}: ") and verdict not in (NOT_RESCUED, RESCUED_TOGETHER)


def transfer(report: Report, arm: str) -> str:
    """Return what an arm with transfer shows: a gain, a failure, or neither.

    A teacher below the baseline explains a failure by itself, so nothing is said of the transfer then.
    """
    if report.undertrained:
        return UNDECIDED
    shown = outcome(report.row(arm).contrast_or_raise())
    if shown == "gains":
        return TRANSFERS
    if report.reference is not None and report.reference.top1 < report.rows[0].top1:
        return WEAK
    return FAILS if shown == "fails" else UNDECIDED


def rescue(report: Report, plain: str, full: str, contrast: str) -> str:
    """Return what ``rescue`` shows: whether the standard student fails, and which components reverse it.

    plain, full: the standard and the native student with transfer; contrast: the difference of differences. The
    architecture is accused where the standard student clearly fails and native components clearly change that for the
    better. A component is named where it alone, in a student that is standard otherwise, turns the failure into a clear
    gain.
    """
    standard = transfer(report, plain)
    if standard != FAILS:
        return standard
    change = outcome(report.contrasts[contrast])
    if change == "gains":
        named = alone(report, plain)
        return fails_by(*named) if named else RESCUED_TOGETHER
    native = outcome(report.row(full).contrast_or_raise())
    return NOT_RESCUED if change == "fails" or native == "fails" else UNDECIDED


def alone(report: Report, plain: str) -> tuple[str, ...]:
    """Return the components that alone turn a failure into a clear gain."""
    added = plain.removeprefix("standard")
    own = report.study.teacher.network.components
    gains = {row.arm for row in report.rows if row.contrast is not None and outcome(row.contrast) == "gains"}
    # A teacher with a single component has no arm for it alone: that is the native student.
    names = {name: f"{name}{added}" if len(own) > 1 else f"native{added}" for name in own}
    return tuple(name for name, arm in names.items() if arm in gains)
