"""Do students match their teacher's maps, and does the match predict what they gain?

Qin et al. 2026: students match the attention of teachers that fail as well as that of teachers that transfer, and still
end below scratch: the use of the maps fails, not their matching.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, TypeVar

import typer

from ablations import claims, gains
from atdiag.core.selection import comma_separated
from atdiag.stats.paired import Gap, gap
from atdiag.study.builder import Lab
from atdiag.study.claims import Judged, Verdict
from atdiag.study.matching import HEAD_BY_HEAD, HEADS_MATCHED, IMAGES, beside
from atdiag.study.protocol import BASELINE, Report, Series
from atdiag.study.registry import ablation
from atdiag.study.verdicts import outcome

PASSED = "distill"
"""The arm of the claims: its loss requires a match, whereas copying matches by construction."""

_LEVEL = 0.05
Key = TypeVar("Key", bound=Hashable)

_NOTES = (
    f"{HEAD_BY_HEAD}: Jensen-Shannon divergence in bits (0: equal, 1: nothing in common) of the student's maps from "
    "the teacher's, head i beside head i, mean over blocks, heads, queries and "
    f"{IMAGES} test images (all of a smaller set); registers that the student lacks are sliced off before softmax. By "
    "block in the CSV.",
    "The heads of a student from scratch have no order, so the claim is judged against its divergence with heads "
    "matched one to one. Intervals of divergences: Student's t over seeds, images held fixed.",
    "copy has the teacher's maps by construction: where all maps are copied its divergence is 0, and not measured.",
)


@ablation(
    order=80,
    reproduce={"teacher": "all"},
    quick={"teacher": "deit_s,dinov2_s,clip_b"},
)
def match(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_b,clip_b; all: every one.")] = "all",
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(gains.METHODS)}.")] = PASSED,
) -> Series:
    """Measure how closely students match their teachers' maps.

    By the distance of each student's attention maps from its teacher's, beside what it gains.
    """
    passed = comma_separated(methods, "methods", "copy,distill")
    measured = beside(lab, lab.teacher(teacher))
    study = gains.study(lab, "match", teacher, passed, measures=(measured,), claims=claims.of("match"))
    notes = (*(_NOTES if "copy" in passed else _NOTES[:2]), *filter(None, [measured.note]))
    return Series("match", (study,), figure="match", verdict=verdict, findings=findings, notes=notes)


def verdict(reports: Sequence[Report]) -> str:
    """Return each study's verdict, with the divergence of its students' maps from the teacher's."""
    return " ".join(" ".join(filter(None, (report.verdict, _distances(report)))) for report in reports)


def findings(reports: Sequence[Report]) -> list[Judged]:
    """Judge whether distilled students match their teachers, and whether their gains depend on it."""
    return [matched(reports), usable(reports)]


def by_seed(report: Report, arm: str, column: str) -> dict[tuple[int, int], float]:
    """Return a measurement of each run of an arm, by seed; empty without such an arm or measurement."""
    row = next((row for row in report.rows if row.arm == arm), None)
    if row is None:
        return {}
    specs = next(one.specs for one in report.study.arms if one.name == arm)
    runs = zip(specs, row.by_run, strict=True)
    return {(spec.seed.data, spec.seed.model): numbers[column] for spec, numbers in runs if column in numbers}


def matched(reports: Sequence[Report]) -> Judged:
    """Judge whether every teacher's distilled students are closer to its maps than students from scratch are.

    By seed: head by head, minus the scratch student's divergence with its heads matched; corrected for the number of
    teachers (Holm).
    """
    from atdiag.stats.contrasts import FEWEST_SEEDS

    claim = claims.stated("match", "the students match")
    asked = {i: (by_seed(r, PASSED, HEAD_BY_HEAD), by_seed(r, BASELINE, HEADS_MATCHED)) for i, r in enumerate(reports)}
    asked = {i: both for i, both in asked.items() if all(both)}
    if not asked:
        return Judged(claim, "not testable here", "", note=f"{PASSED} is not among the methods: no maps were measured")
    found = {i: gap(*both) for i, both in asked.items()}
    gaps = {i: one for i, one in found.items() if one is not None}
    least = min(one.seeds if one else 1 for one in found.values())
    if least < FEWEST_SEEDS:
        return Judged(claim, "undecided", "", seeds=least, note=too_few(least))
    clear = settled(gaps)
    closer = sum(gaps[i].value < 0 for i in clear)
    against = len(clear) - closer
    word: Verdict = "does not hold" if against else "holds" if closer == len(gaps) else "undecided"
    open_ = [reports[i].study.label for i in gaps if i not in clear]
    return Judged(
        claim,
        word,
        f"{bits(list(gaps.values()))}, {closer} of {len(gaps)} clearly closer",
        seeds=least,
        note=f"not clear: {', '.join(open_)}" if open_ else "",
    )


def usable(reports: Sequence[Report]) -> Judged:
    """Judge whether teachers that fail are matched as well as those that gain.

    With so few teachers, the absence of a correlation proves nothing. So the claim holds if every teacher that fails is
    matched clearly better than some teacher that gains, which rules out bad matching as the cause of failure; it does
    not hold if a worse match clearly goes with a smaller gain; everything else is undecided.
    """
    from atdiag.stats.association import spearman
    from atdiag.stats.contrasts import FEWEST_SEEDS

    claim = claims.stated("match", "matching is not the issue")
    seeds = {i: by_seed(r, PASSED, HEAD_BY_HEAD) for i, r in enumerate(reports)}
    effects = {i: reports[i].row(PASSED).contrast_or_raise() for i, found in seeds.items() if found}
    count = len(effects)
    if count < 3:
        return Judged(claim, "not testable here", "", note=f"it takes at least 3 teachers, and there are {count}")
    jsd = {i: sum(seeds[i].values()) / len(seeds[i]) for i in effects}
    ranks = spearman(list(jsd.values()), [one.value for one in effects.values()])
    least = min(one.seeds for one in effects.values())
    ours = f"rank correlation of divergence and gain {ranks.rho:+.2f}, p = {ranks.p:.2g}, {count} teachers"
    if least < FEWEST_SEEDS:
        return Judged(claim, "undecided", ours, seeds=least, note=too_few(least))
    if ranks.least >= _LEVEL:
        why = f"with {count} teachers no correlation can reach p < {ranks.least:.2g}"
        return Judged(claim, "not testable here", ours, seeds=least, note=why)
    by = {kind: [i for i, one in effects.items() if outcome(one) == kind] for kind in ("fails", "gains")}
    for kind, which in by.items():
        if not which:
            return Judged(claim, "not testable here", ours, seeds=least, note=f"no teacher clearly {kind}")
    pairs = {(bad, good): gap(seeds[bad], seeds[good]) for bad in by["fails"] for good in by["gains"]}
    better = settled({pair: one for pair, one in pairs.items() if one is not None and one.value < 0}, len(pairs))
    shown = [bad for bad in by["fails"] if any(bad == one for one, _ in better)]
    hangs_on_it = ranks.rho < 0 and ranks.p < _LEVEL
    every = len(shown) == len(by["fails"])
    word: Verdict = "undecided" if hangs_on_it == every else "holds" if every else "does not hold"
    note = f"{len(shown)} of {len(by['fails'])} failing teachers matched clearly better than one that gains"
    return Judged(claim, word, ours, seeds=least, note=note)


def settled(gaps: Mapping[Key, Gap], among: int = 0) -> list[Key]:
    """Return the keys whose gap is settled, corrected for this many comparisons."""
    from atdiag.stats.contrasts import holm

    rest = [1.0] * (among - len(gaps))
    adjusted = holm([*(one.p for one in gaps.values()), *rest])
    return [key for key, p in zip(gaps, adjusted, strict=False) if p < _LEVEL]


def too_few(seeds: int) -> str:
    """Return why so few seeds settle nothing."""
    return f"{'one seed says' if seeds == 1 else 'two seeds say'} too little of other seeds: give three or more"


def bits(gaps: Sequence[Gap]) -> str:
    """Format a difference of divergences with its interval, or the span of several."""
    if len(gaps) == 1:
        return f"{gaps[0].value:+.3f} bits [{gaps[0].low:+.3f}, {gaps[0].high:+.3f}]"
    return f"{min(one.value for one in gaps):+.3f} to {max(one.value for one in gaps):+.3f} bits"


def _distances(report: Report) -> str:
    rows = [row for row in report.rows[1:] if HEAD_BY_HEAD in row.numbers]
    baseline = report.rows[0].numbers
    if not rows or HEAD_BY_HEAD not in baseline:
        return ""
    said = ", ".join(f"{row.arm} {row.numbers[HEAD_BY_HEAD]:.3f}" for row in rows)
    scratch = f"{baseline[HEAD_BY_HEAD]:.3f} (heads matched {baseline[HEADS_MATCHED]:.3f})"
    return f"Maps, bits from the teacher's: {said}, {report.rows[0].arm} {scratch}."
