"""Transfer the attention of some blocks only: of the top or the bottom k.

Qin et al. 2026: for DINOv2-S every such subset is below the baseline, and the top blocks are worse.
"""

from __future__ import annotations

from typing import Annotated

import typer

from atdiag.spec import Network
from atdiag.study.ablation import BASELINE, Arm, Contrast, Lab, Report, Study, choose, judge
from atdiag.words import UserError


def layers(
    lab: Lab,
    from_: Annotated[str, typer.Option("--from", help="Which end the blocks are counted from: top or bottom.")] = "top",
    k: Annotated[int | None, typer.Option("--k", help="How many blocks. [default: 6]")] = None,
    teacher: Annotated[str, typer.Option(help="The teacher, such as dinov2_s.")] = "dinov2_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    sweep: Annotated[bool, typer.Option("--sweep", help="Every k from 0 to the depth, as a curve.")] = False,
) -> Study:
    """Transfer the attention of the top (or bottom) k blocks only, beside none and all."""
    choose(from_, ("top", "bottom"), "--from")
    source = lab.teacher(teacher)
    student = lab.student(source)
    depth = student.depth
    if sweep and k is not None:
        raise UserError(f"--k {k} with --sweep, which takes every k", "leave one of them out")
    k = 6 if k is None else k
    if not 0 <= k <= depth:
        raise UserError(f"--k {k}: {source.label} has {depth} blocks", f"give a number from 0 to {depth}")
    counts = range(depth + 1) if sweep else sorted({0, k, depth})

    def arm(count: int) -> Arm:
        if count == 0:
            return lab.baseline(source)
        which = lab.transfer(transfer, student, blocks(student, from_, count))
        return lab.arm(_name(from_, count, depth), student, source, transfer=which)

    arms = tuple(arm(count) for count in counts)
    part, whole = _name(from_, k, depth), _name(from_, depth, depth)

    def verdict(report: Report) -> str:
        if sweep:
            best = max(report.rows, key=lambda row: row.top1)
            sentence = judge(report.row(whole).contrast_or_raise(), "helps", "hurts")
            return (
                f"{transfer.capitalize()} of all {depth} blocks of {source.label} {sentence}; along the curve "
                f"{best.arm} is highest ({best.top1:.1f} %), chosen after the fact."
            )
        if k == 0:
            return "k = 0 transfers nothing: this is the baseline."
        said = judge(report.row(part).contrast_or_raise(), "helps", "hurts")
        if k == depth or report.rows[0].seeds == 1:
            which = f"all {depth}" if k == depth else f"the {from_} {k} of {depth}"
            return f"{transfer.capitalize()} of {which} blocks of {source.label} {said}."
        rest = judge(
            report.contrasts[f"{part} minus {whole}"],
            "is better than all",
            "is worse than all",
            "can't be told apart from all",
        )
        return f"{transfer.capitalize()} of the {from_} {k} of {depth} blocks of {source.label} {said}, and {rest}."

    contrasts = [Contrast(f"{part} minus {whole}", {part: 1, whole: -1})] if not sweep and 0 < k < depth else []
    return Study(
        ablation="layers",
        teacher=source,
        options={"from": from_, "transfer": transfer} | ({"sweep": "all k"} if sweep else {"k": str(k)}),
        arms=arms,
        contrasts=tuple(contrasts),
        verdict=verdict,
        figure="layer_curve" if sweep else "contrasts",
        reference=lab.reference(source),
        curve={arm.name: count for arm, count in zip(arms, counts, strict=True)} if sweep else {},
    )


def blocks(network: Network, end: str, count: int) -> tuple[int, ...]:
    """The ``count`` blocks nearest the output (``top``) or the input (``bottom``)."""
    return tuple(range(network.depth - count, network.depth) if end == "top" else range(count))


def _name(end: str, count: int, depth: int) -> str:
    return BASELINE if count == 0 else "all blocks" if count == depth else f"{end} {count}"
