"""Judge a claim: *holds*, *does not hold*, *undecided*, *not testable here*.

The judgement depends only on the intervals of the contrasts that the claim names, corrected for the number of contrasts
in the same reading. A claim holds if every contrast is clear of zero in the claimed direction; it does not hold if at
least one is clear of zero in the other direction, or was shown to be equivalent to zero. Everything else is undecided:
too few seeds are not evidence against a paper. Studies whose baseline is near chance are named but not counted
(:mod:`atdiag.study.chance`); if there are no others, the claim is not testable here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from atdiag.networks.registry import teachers
from atdiag.study.claims import Claim, Judged, Verdict

if TYPE_CHECKING:
    from atdiag.stats.contrasts import Estimate
    from atdiag.study.protocol import Report


def judge_claim(claim: Claim, reports: Sequence[Report]) -> Judged:
    """Judge a claim from the reports of its studies."""
    found: list[Estimate] = []
    tested: set[str] = set()
    spared: list[str] = []
    undertrained: list[str] = []
    for report in reports:
        family = teachers.family(report.study.teacher.name)
        if claim.families and family not in claim.families:
            continue
        if report.undertrained:
            undertrained.append(report.study.label)
            continue
        arms = {row.arm: row.contrast for row in report.rows if row.contrast is not None}
        given = _matching(arms, claim.failing)
        if claim.failing and not (given and all(e.clear and e.value < 0 for e in given)):
            spared.append(report.study.label)
            continue
        matching = _matching(arms, claim.arms) + _matching(report.contrasts, claim.contrasts)
        found += matching
        if matching and family:
            tested.add(family)
    missing = [name for name in claim.families if name not in tested]
    note = f"not tested: {', '.join(missing)}" if missing else ""
    if spared:
        note = f"no failure to reverse: {', '.join(spared)}"
    if undertrained:
        note = "; ".join(filter(None, (note, f"undertrained: {', '.join(undertrained)}")))
    if not found:
        return Judged(claim, "not testable here", "", note=note or "no such contrast was measured")
    return Judged(
        claim,
        _verdict(claim, found),
        _ours(claim, found),
        min(e.low for e in found),
        max(e.high for e in found),
        min(e.seeds for e in found),
        note,
    )


def _matching(estimates: Mapping[str, Estimate], patterns: Sequence[str]) -> list[Estimate]:
    return [one for name, one in estimates.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _sign(claim: Claim) -> int:
    return 1 if claim.direction == "above" else -1


def _verdict(claim: Claim, estimates: Sequence[Estimate]) -> Verdict:
    sign = _sign(claim)
    if any((e.clear and e.value * sign < 0) or e.within is not None for e in estimates):
        return "does not hold"
    return "holds" if all(e.clear for e in estimates) else "undecided"


def _ours(claim: Claim, estimates: Sequence[Estimate]) -> str:
    """Format our result: ``+3.1``, or for several contrasts ``+3.1 to +9.2 (5 of 6 clear)``."""
    if len(estimates) == 1:
        return f"{estimates[0].value:+.1f}"
    sign = _sign(claim)
    clear = sum(e.clear and e.value * sign > 0 for e in estimates)
    against = sum(e.clear and e.value * sign < 0 for e in estimates)
    span = f"{min(e.value for e in estimates):+.1f} to {max(e.value for e in estimates):+.1f}"
    opposite = f", {against} the other way" if against else ""
    return f"{span} ({clear} of {len(estimates)} clear{opposite})"
