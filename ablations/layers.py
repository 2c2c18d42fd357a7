"""Transfer the attention of some blocks only: of the top or the bottom k.

Qin et al. 2026: for DINOv2-S every such subset is below the baseline, and the top blocks are worse.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec import Network
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

ENDS = {"top": ("top",), "bottom": ("bottom",), "both": ("top", "bottom")}


@ablation(
    order=70,
    reproduce={"from_": "both", "k": "3,6,9", "teacher": "dinov2_s"},
    quick={"from_": "both", "k": "6", "teacher": "dinov2_s"},
    papers=("2024", "2026"),
)
def layers(
    lab: Lab,
    from_: Annotated[str, typer.Option("--from", help="Which end they are counted from: top, bottom or both.")] = "top",
    k: Annotated[str | None, typer.Option("--k", help="How many blocks, such as 6 or 3,6,9. [default: 6]")] = None,
    teacher: Annotated[str, typer.Option(help="Teachers, such as dinov2_s.")] = "dinov2_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    sweep: Annotated[bool, typer.Option("--sweep", help="Every k from 0 to the depth, as a curve.")] = False,
) -> Study:
    """Transfer the attention of the top (or bottom) k blocks only.

    Beside them stand no transfer and the transfer of all blocks.
    """
    ends = ENDS[choose(from_, tuple(ENDS), "from_")]
    source = lab.teacher(teacher)
    student = lab.student(source)
    depth = student.depth
    if sweep and k is not None:
        raise UserError(f"`k` {k} with `sweep`, which takes every k", "leave one of them out")
    wanted = str(k) if k is not None else "6" if depth > 6 else str(max(1, depth // 2))
    asked = (
        range(depth + 1)
        if sweep
        else sorted({_number(part, source.label, depth) for part in comma_separated(wanted, "k", "3,6,9")})
    )
    parts = [(end, count) for count in asked if 0 < count < depth for end in ends]

    def arm(end: str, count: int) -> Arm:
        which = lab.transfer(transfer, student, blocks(student, end, count))
        return lab.arm(_name(end, count, depth), student, source, transfer=which)

    whole = arm(ends[0], depth)
    arms = (lab.baseline(source), *(arm(end, count) for end, count in parts), whole)

    def verdict(report: Report) -> str:
        every = f"{transfer.capitalize()} of all {depth} blocks of {source.label} "
        every += verb_phrase(report.row(whole.name).contrast_or_raise(), "helps", "hurts")
        if sweep:
            best = max(report.rows, key=lambda row: row.top1)
            return f"{every}; along the curve {best.arm} is highest ({best.top1:.1f} %), chosen after the fact."
        if not parts:
            return "k = 0 transfers nothing: this is the baseline." if list(asked) == [0] else f"{every}."
        (end, count), *others = parts
        said = [f"{transfer.capitalize()} of the {end} {count} of {depth} blocks of {source.label} "]
        said += [f"of the {end} {count} " for end, count in others]
        of_parts = [f"{words}{_part(report, *part, depth)}" for words, part in zip(said, parts, strict=True)]
        return f"{'; '.join(of_parts)}."

    single = len(asked) == 1
    return Study(
        ablation="layers",
        teacher=source,
        options={"from": from_, "transfer": transfer, "k": "all" if sweep else ",".join(map(str, asked))},
        arms=arms,
        contrasts=() if sweep else _contrasts(ends, [count for count in asked if 0 < count < depth], whole.name),
        verdict=verdict,
        figure="contrasts" if single and len(ends) == 1 else "layer_curve",
        together="layer_curves",
        claims=claims.of("layers"),
        reference=lab.reference(source),
        curve={BASELINE: 0, **{_name(*part, depth): part[1] for part in parts}, whole.name: depth},
    )


def blocks(network: Network, end: str, count: int) -> tuple[int, ...]:
    """Return the ``count`` blocks nearest the output (``top``) or the input (``bottom``)."""
    return tuple(range(network.depth - count, network.depth) if end == "top" else range(count))


def _contrasts(ends: tuple[str, ...], counts: list[int], whole: str) -> tuple[Contrast, ...]:
    """Return each part minus the whole; with both ends, also the top minus equally many from the bottom."""
    if len(ends) == 2:
        pairs = [(f"top {count}", f"bottom {count}") for count in counts]
    else:
        pairs = [(f"{ends[0]} {count}", whole) for count in counts]
    return tuple(Contrast(f"{one} minus {other}", {one: 1, other: -1}) for one, other in pairs)


def _part(report: Report, end: str, count: int, depth: int) -> str:
    """Describe the effect of a part, and whether it differs clearly from that of all blocks."""
    name = _name(end, count, depth)
    said = verb_phrase(report.row(name).contrast_or_raise(), "helps", "hurts")
    against = report.contrasts.get(f"{name} minus {_name(end, depth, depth)}")
    if against is None or not against.decides:
        return said
    return f"{said}, and " + verb_phrase(
        against, "is better than all", "is worse than all", "can't be told apart from all"
    )


def _name(end: str, count: int, depth: int) -> str:
    return BASELINE if count == 0 else "all blocks" if count == depth else f"{end} {count}"


def _number(text: str, label: str, depth: int) -> int:
    if not text.lstrip("-").isdecimal():
        raise UserError(
            f"`k` {text!r} is not a number of blocks", f"give numbers from 0 to {depth}, such as 6 or 3,6,9"
        )
    if not 0 <= int(text) <= depth:
        raise UserError(f"`k` {text}: {label} has {depth} blocks", f"give a number from 0 to {depth}")
    return int(text)
