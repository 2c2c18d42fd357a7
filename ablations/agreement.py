"""How closely does each method's student agree with its teacher's maps, and must it, to gain?

Li et al. 2024: students that copy the teacher's queries alone have maps unlike the teacher's, although no copy gains
more. So the maps of every method's students are compared with the pre-trained teacher's, and with those of the
fine-tuned teacher of the same seed. Heads have no order in a student that never saw the teacher's, and its own order
in one that did: so they are matched in four ways, and the claim must hold in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from ablations import claims, gains
from ablations.match import bits, by_seed, settled, too_few
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.stats.paired import gap
from atdiag.study.builder import Lab
from atdiag.study.claims import Judged, Verdict
from atdiag.study.matching import IMAGES, MATCHED_BY, PRE_TRAINED, TUNED, Agreement, column
from atdiag.study.protocol import BASELINE, LEFT_OUT, Arm, Contrast, Report, Series
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

TENSORS = {"copy q": "q", "copy k": "k"}
"""Arms that copy a single tensor."""
METHODS = ("copy", "distill", *TENSORS, "finetune", "logits", "features")
_TYPED = {name.replace(" ", "-"): name for name in METHODS}
_QUERIES, _YARDSTICK = "copy q", "distill"
_TUNING = "finetune"


@ablation(
    order=82,
    reproduce={"teacher": "deit_s,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "methods": "copy,distill,copy-q,finetune"},
    papers=("2024",),
)
def agreement(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    methods: Annotated[
        str | None,
        typer.Option(help=f"Some of {', '.join(_TYPED)}. [default: those that the teacher allows]"),
    ] = None,
) -> Series:
    """Compare every method's maps with its teacher's.

    By their divergence from the pre-trained and from the fine-tuned teacher's, with heads matched in four ways.
    """
    typed = list(_TYPED) if methods is None else comma_separated(methods, "methods", "copy,copy-q")
    for name in typed:
        choose(name, tuple(_TYPED), "methods")
    wanted = [_TYPED[name] for name in typed]
    source = lab.teacher(teacher)
    notes: list[str] = []
    if methods is None:
        try:
            gains.study(lab, "agreement", teacher, ("logits",))
        except UserError as fault:
            wanted.remove("logits")
            notes.append(f"{LEFT_OUT}logits: {fault}.")
    planned = gains.study(lab, "agreement", teacher, [name for name in wanted if name not in TENSORS])
    made = {arm.name: arm for arm in planned.arms}
    student = lab.student(source)

    def arm(name: str) -> Arm:
        if name not in TENSORS:
            return made[name]
        passed = lab.under("transfer.tensor", TENSORS[name]).transfer("copy", student)
        return lab.arm(name, student, source, transfer=passed)

    copies = [name for name in wanted if name.startswith("copy") and name != _QUERIES]

    def verdict(report: Report) -> str:
        said = [
            f"{name} {verb_phrase(report.row(name).contrast_or_raise(), 'helps', 'hurts')}{_distances(report, name)}"
            for name in wanted
        ]
        return f"{planned.label}: {'; '.join(said)}."

    study = replace(
        planned,
        arms=(made[BASELINE], *map(arm, wanted)),
        contrasts=tuple(
            Contrast(f"{_QUERIES} minus {name}", {_QUERIES: 1, name: -1}) for name in copies if _QUERIES in wanted
        ),
        options={"methods": ",".join(typed)},
        verdict=verdict,
        measures=(
            Agreement(source),
            *([Agreement(source, tuned=made[_TUNING].specs)] if _TUNING in made else []),
        ),
        claims=claims.of("agreement"),
    )
    notes.append(
        f"JSD: Jensen-Shannon divergence in bits (0: equal, 1: nothing in common) of the maps that a student uses from "
        f"those of the {PRE_TRAINED} teacher, and of the {TUNED} one of the same seed (the arm {_TUNING}); mean over "
        f"blocks, heads, queries and {IMAGES} test images (all of a smaller set). Heads matched one to one, with the "
        "least mean; head by head (same), each with the nearest (best) and averaged: in the figure and the CSV."
    )
    return Series("agreement", (study,), figure="agreement", findings=findings, notes=tuple(notes))


def findings(reports: Sequence[Report]) -> list[Judged]:
    """Judge whether students that copy queries have maps unlike the teacher's."""
    return [unlike(reports)]


def unlike(reports: Sequence[Report]) -> Judged:
    """Judge whether copied queries leave maps clearly further from the pre-trained teacher's than distillation does.

    "Low similarity" needs a yardstick: the students of distillation, whose loss asks for the teacher's maps and no
    more. Differences are paired by seed, one for each teacher and matching of heads, and corrected for their number
    (Holm). The claim holds if all are clear; it does not hold if one is clear the other way.
    """
    from atdiag.stats.contrasts import FEWEST_SEEDS

    claim = claims.stated("agreement", "copied queries, other maps")
    short = [report.study.label for report in reports if report.undertrained]
    asked = [
        (by_seed(report, _QUERIES, column(PRE_TRAINED, how)), by_seed(report, _YARDSTICK, column(PRE_TRAINED, how)))
        for report in reports
        if not report.undertrained
        for how in MATCHED_BY
    ]
    if not asked:
        return Judged(claim, "not testable here", "", note=f"undertrained: {', '.join(short)}")
    if not all(one and other for one, other in asked):
        return Judged(claim, "not testable here", "", note=f"it takes the methods {_QUERIES} and {_YARDSTICK}")
    found = [gap(*both) for both in asked]
    gaps = {i: one for i, one in enumerate(found) if one is not None}
    least = min(one.seeds if one else 1 for one in found)
    ours = f"{bits(list(gaps.values()))} beside {_YARDSTICK}" if gaps else ""
    if least < FEWEST_SEEDS:
        return Judged(claim, "undecided", ours, seeds=least, note=too_few(least))
    clear, note = settled(gaps), f"undertrained: {', '.join(short)}" if short else ""
    further = sum(gaps[i].value > 0 for i in clear)
    word: Verdict = "does not hold" if further < len(clear) else "holds" if further == len(gaps) else "undecided"
    return Judged(claim, word, f"{ours}, {further} of {len(gaps)} clearly further", seeds=least, note=note)


def _distances(report: Report, name: str) -> str:
    numbers = report.row(name).numbers
    if column(PRE_TRAINED) not in numbers:
        return ""
    return f", its maps {numbers[column(PRE_TRAINED)]:.3f} bits from the teacher's"
