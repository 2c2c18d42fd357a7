"""Copy each block's attention alone: which blocks carry the gain, and does anything about a block foretell it?

The effect of each block is set beside what can be measured of the teacher's block without training: how much its
attention adds to the stream, and the statistics of its maps; and beside its divergence from the maps of students from
scratch at the same depth. Rank correlations over blocks, corrected (Holm) for the number of measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Annotated

import typer

from atdiag.core.spec import Teacher
from atdiag.study.builder import Lab
from atdiag.study.matching import HEAD_BY_HEAD, beside
from atdiag.study.protocol import BASELINE, Arm, Report, Series, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import effect, verb_phrase

if TYPE_CHECKING:
    from atdiag.stats.association import Ranks

IMAGES = 64
"""Images that the teacher's blocks are measured on."""
STATISTICS = ("entropy", "distance", "class_share", "register_share", "sink", "redundancy", "rank")
NAMES = {
    "gain": "gain of the branch",
    "class_share": "share of the class token",
    "register_share": "share of registers",
    "sink": "share of one token",
    "redundancy": "agreement of heads",
    "JSD": "JSD from scratch",
}
"""Measurement -> its name for readers, where it is another."""
LEVEL = 0.05


@ablation(order=160, reproduce={}, papers=())
def blockwise(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as dinov2_s.")] = "dinov2_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
) -> Series:
    """Transfer the attention of each block alone: which gains?"""
    source = lab.teacher(teacher)
    student = lab.student(source)

    def arm(name: str, blocks: Sequence[int]) -> Arm:
        return lab.arm(name, student, source, transfer=lab.transfer(transfer, student, tuple(blocks)))

    single = tuple(arm(named(block), [block]) for block in range(student.depth))
    taken = [one.specs[0].transfer.sources[0] for one in single]  # the teacher's blocks
    maps = beside(lab, source, range(student.depth))
    study = Study(
        ablation="blockwise",
        teacher=source,
        options={"transfer": transfer},
        arms=(lab.baseline(source), *single, arm("all blocks", range(student.depth))),
        contrasts=(),
        verdict=lambda report: _said(report, _of_blocks(measured(source, lab), taken)),
        measures=(maps,),
        reference=lab.reference(source),
        curve={named(block): block for block in range(student.depth)},
        notes=(
            f"Of the teacher's blocks, on {IMAGES} images: the gain of the attention branch, ||branch|| / ||stream||; "
            f"of the maps, means over heads: {', '.join(STATISTICS)} (atdiag stats). {NAMES['JSD']}: of the maps of "
            "students from scratch from the teacher's, head by head.",
            *filter(None, [maps.note]),
        ),
    )
    return Series("blockwise", (study,), figure="blockwise")


def named(block: int) -> str:
    """Return the name of the arm that transfers one block."""
    return f"block {block}"


def measured(source: Teacher, lab: Lab) -> dict[str, list[float]]:
    """Return each measurement of the teacher's blocks, by name; none without its weights."""
    if source.sha256 is None:
        return {}
    from atdiag.analysis import images, statistics, subjects
    from atdiag.hooks.branches import branch_gains

    data = lab.settings.profile.data
    subject = subjects.loaded(source, data)
    some = images.choose(IMAGES, data, subject.network)
    (found,) = statistics.attention_stats([subject], some)
    every = {"gain": branch_gains(subject, some)} | {name: found.heads[name].mean(1) for name in STATISTICS}
    return {name: values.tolist() for name, values in every.items()}


def _of_blocks(found: Mapping[str, Sequence[float]], blocks: Sequence[int]) -> dict[str, list[float]]:
    """Return the measurements of the teacher's blocks that give to the student's, in the student's order."""
    return {name: [values[block] for block in blocks] for name, values in found.items()}


def associations(report: Report, of_blocks: Mapping[str, Sequence[float]]) -> dict[str, tuple[Ranks, float]]:
    """Return each measurement's rank correlation with the blocks' effects, and its corrected p-value, by its name.

    A measurement that is missing for some block, or equal for all, is left out. Empty for fewer than three blocks.
    """
    from atdiag.stats.association import spearman
    from atdiag.stats.contrasts import holm

    blocks = [name for name in report.study.curve if name.startswith("block ")]
    effects = [report.row(name).contrast_or_raise().value for name in blocks]
    scratch = report.row(BASELINE).numbers
    own = {name: list(values) for name, values in of_blocks.items()}
    own["JSD"] = [scratch.get(f"{HEAD_BY_HEAD} {name}", float("nan")) for name in blocks]
    usable = {
        name: values
        for name, values in own.items()
        if len(values) == len(effects) >= 3 and not any(map(isnan, values)) and len(set(values)) > 1
    }
    found = {NAMES.get(name, name): spearman(values, effects) for name, values in usable.items()}
    adjusted = holm([one.p for one in found.values()])
    return {name: (one, p) for (name, one), p in zip(found.items(), adjusted, strict=True)}


def _said(report: Report, of_blocks: Mapping[str, Sequence[float]]) -> str:
    transfer = report.study.options["transfer"]
    label = report.study.teacher.label
    rows = [row for row in report.rows if row.arm.startswith("block ")]
    helping = [row.arm.removeprefix("block ") for row in rows if (e := row.contrast_or_raise()).clear and e.value > 0]
    hurting = [row.arm.removeprefix("block ") for row in rows if (e := row.contrast_or_raise()).clear and e.value < 0]
    whole = verb_phrase(report.row("all blocks").contrast_or_raise(), "helps", "hurts")
    best = max(rows, key=lambda row: row.top1)
    parts = [f"{transfer.capitalize()} of all blocks of {label} {whole}; of single blocks, "]
    clear = [f"{', '.join(some)} {what}" for some, what in ((helping, "help"), (hurting, "hurt")) if some]
    parts.append(" and ".join(clear) or "none is clear of zero")
    parts.append(f"; the highest, chosen after the fact, is {best.arm} ({effect(best.contrast_or_raise())}).")
    if found := associations(report, of_blocks):
        telling = [f"{name} (rho {one.rho:+.2f}, p {p:.3f})" for name, (one, p) in found.items() if p < LEVEL]
        none = f"no measurement of a block goes with its effect (the strongest: {_strongest(found)})"
        parts.append(f" Over {len(rows)} blocks, {'with the effect go: ' + ', '.join(telling) if telling else none}.")
    return "".join(parts)


def _strongest(found: Mapping[str, tuple[Ranks, float]]) -> str:
    name, (one, p) = max(found.items(), key=lambda item: abs(item[1][0].rho))
    return f"{name}, rho {one.rho:+.2f}, p {p:.2f}"
