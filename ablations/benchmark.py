"""Everything that can pass from a teacher, side by side: its attention, its outputs, its features, its weights.

Li et al. 2024 set attention copy and distillation beside training from scratch and fine-tuning (MAE ViT-L on
ImageNet-1k: 83.0, 85.1, 85.7, 85.7); Qin et al. 2026 do so for 20 teachers, four of whose families end below scratch.
Distillation of logits (Hinton et al. 2015) and of the residual stream are the comparisons that pass no attention.
"""

from __future__ import annotations

from typing import Annotated

import typer

from atdiag.spec import Init
from atdiag.study.ablation import BASELINE, Arm, Lab, Report, Study, choose, judge
from atdiag.words import UserError

METHODS = ("copy", "distill", "finetune", "logits", "features")
_SAID = {
    "copy": "copying its attention",
    "distill": "distilling its attention",
    "finetune": "starting from all its weights",
    "logits": "distilling its logits",
    "features": "distilling its residual stream",
}


def benchmark(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="The teacher, such as deit_b.")] = "deit_b",
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(METHODS)}.")] = "copy,distill,finetune",
) -> Study:
    """Copy, distill and fine-tune beside scratch: what does this teacher give a student?"""
    wanted = tuple(dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()))
    for method in wanted:
        choose(method, METHODS, "--methods")
    if not wanted:
        raise UserError("--methods names none", f"write it as '{','.join(METHODS[:3])}'")
    source = lab.teacher(teacher)
    standard = lab.student(source)
    own = source.network.components

    def arm(method: str) -> Arm:
        if method == "finetune":  # the teacher's own architecture: nothing of it is lost
            return lab.arm(method, lab.student(source, own), source, Init(source="teacher"), recipe="finetune")
        return lab.arm(method, standard, source, transfer=lab.transfer(method, standard, allowed=METHODS))

    def verdict(report: Report) -> str:
        said = [f"{_SAID[name]} {judge(report.row(name).contrast_or_raise(), 'helps', 'hurts')}" for name in wanted]
        return f"{source.label}: {'; '.join(said)}."

    return Study(
        ablation="benchmark",
        teacher=source,
        options={"methods": ",".join(wanted)},
        arms=(lab.baseline(source), *map(arm, wanted)),
        contrasts=(),
        verdict=verdict,
        reference=lab.reference(source),
        notes=(
            f"{BASELINE} and all but finetune train the standard student; finetune is the teacher itself, trained on.",
        ),
    )
