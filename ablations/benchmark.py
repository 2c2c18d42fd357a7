"""Compare everything that a teacher can transfer: its attention, its outputs, its features, its weights.

Li et al. 2024 compare attention copy and distillation with training from scratch and fine-tuning (MAE ViT-L on
ImageNet-1k: 83.0, 85.1, 85.7, 85.7); Qin et al. 2026 do so for 20 teachers, four of whose families end below scratch.
Distillation of logits (Hinton et al. 2015) and of the residual stream are comparisons without attention.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims, gains
from atdiag.core.selection import comma_separated
from atdiag.study.builder import Lab
from atdiag.study.protocol import Study
from atdiag.study.registry import ablation


@ablation(
    order=10,
    reproduce={"teacher": "all"},
    quick={"teacher": "deit_s,dinov2_s,clip_b", "methods": "copy,distill"},
    papers=("2024", "2026"),
)
def benchmark(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_b,clip_b; all: every one.")] = "all",
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(gains.METHODS)}.")] = "copy,distill,finetune",
) -> Study:
    """Copy, distill, fine-tune: what does each teacher give?

    Each teacher's arms stand beside a student from scratch.
    """
    wanted = comma_separated(methods, "methods", ",".join(gains.METHODS[:3]))
    return gains.study(lab, "benchmark", teacher, wanted, claims=claims.of("benchmark"))
