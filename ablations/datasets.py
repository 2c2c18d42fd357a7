"""Transfer on other data sets: is a failure due to the data set?

Qin et al. 2026 transfer on iNaturalist 2017, 2018 and 2019: DeiT-S gains 15.2 points and DINO-S 19.4, DINOv2-S loses
1.2 and DINOv2-S with registers 2.2.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims, gains
from atdiag.core.selection import comma_separated
from atdiag.data import sources
from atdiag.study.builder import Lab
from atdiag.study.protocol import Series
from atdiag.study.registry import ablation

USUAL = {
    "mini": "digits,larger",
    "small": "imagenette,cifar10",
    "paper": "imagenet,inat2017,inat2018,inat2019",
}


@ablation(
    order=40,
    reproduce={"teacher": "deit_s,dino_s,dinov2_s,dinov2_reg_s"},
    mini={"teacher": "deit_s,dinov2_s,dinov2_reg_s"},  # DINO's architecture at this size is DeiT's
    quick={"teacher": "deit_s,dinov2_s"},
)
def datasets(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s,dinov2_s.")] = "dinov2_s",
    data: Annotated[
        str | None, typer.Option("--data", help="Data sets, such as digits,larger. [default: those of the profile]")
    ] = None,
    methods: Annotated[str, typer.Option(help="Some of copy, distill and finetune.")] = "copy",
) -> Series:
    """Transfer on several data sets: does the outcome persist?

    Each data set has its own baseline.
    """
    given = USUAL.get(lab.settings.profile.name, "") if data is None else data
    wanted = [sources.named(name) for name in comma_separated(given, "data", "digits,larger")]
    passed = comma_separated(methods, "methods", "copy,distill")
    studies = tuple(
        gains.study(
            lab.under("data.name", name),
            "datasets",
            teacher,
            passed,
            where=name,
            options={"data": name},
            claims=claims.of("datasets"),
        )
        for name in wanted
    )
    return Series("datasets", studies, figure="gains")
