"""Train for longer: does a failure disappear, does a gain?

Qin et al. 2026 train up to 100 epochs: DeiT-S and DINO-S stay above scratch, DINOv2-S below. Each length is a separate
training with its own schedule and baseline, not a checkpoint of the longest one.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims, gains
from atdiag.core.errors import UserError
from atdiag.core.selection import comma_separated
from atdiag.study.builder import Lab
from atdiag.study.protocol import Series
from atdiag.study.registry import ablation


@ablation(
    order=30,
    reproduce={"teacher": "deit_s,dino_s,dinov2_s,dinov2_reg_s"},
    mini={"teacher": "deit_s,dinov2_s"},  # DINO's architecture at this size is DeiT's
    quick={"teacher": "deit_s,dinov2_s", "epochs": "2,4"},
)
def epochs(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s,dinov2_s.")] = "dinov2_s",
    epochs: Annotated[
        str | None,
        typer.Option("--epochs", help="Lengths, such as 2,4,8. [default: half, once and twice the profile's]"),
    ] = None,
    methods: Annotated[str, typer.Option(help="Some of copy, distill and finetune.")] = "copy",
) -> Series:
    """Train for several lengths: does the outcome persist?

    Each length has its own baseline.
    """
    usual = lab.settings.profile.recipe["none"].epochs
    lengths = (
        (usual // 2 or 1, usual, 2 * usual)
        if epochs is None
        else tuple(map(_number, comma_separated(epochs, "epochs", "2,4,8")))
    )
    passed = comma_separated(methods, "methods", "copy,distill")
    studies = tuple(
        gains.study(
            lab.under("recipe.epochs", length),
            "epochs",
            teacher,
            passed,
            where=f"{length} epochs",
            options={"epochs": str(length)},
            claims=claims.of("epochs"),
            short_on_purpose=length < max(lengths),
        )
        for length in sorted(set(lengths))
    )
    return Series("epochs", studies, figure="epochs")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UserError(f"`epochs` {text!r} is not a number of epochs", "write it as '2,4,8'")
    return int(text)
