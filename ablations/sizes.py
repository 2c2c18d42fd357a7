"""Compare all sizes of a family: is a failure due to the family or the size?

Qin et al. 2026: the split is consistent within families, from S to L.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ablations import claims, gains
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.networks.registry import teachers
from atdiag.study.builder import Lab
from atdiag.study.protocol import Series
from atdiag.study.registry import ablation


@ablation(
    order=20,
    reproduce={"family": "all"},
    quick={"family": "dinov2", "methods": "copy"},
    papers=("2024", "2026"),
)
def sizes(
    lab: Lab,
    family: Annotated[str, typer.Option(help="Families, such as deit,dinov2; all: every one with two sizes.")] = "all",
    methods: Annotated[str, typer.Option(help="Some of copy, distill and finetune.")] = "copy,distill",
) -> Series:
    """Transfer from every size of a family: is it due to size?"""
    by_family: dict[str, list[str]] = {}
    for name in lab.teachers:
        by_family.setdefault(teachers.row(name).family, []).append(name)
    several = [name for name, sizes in by_family.items() if len(sizes) > 1]
    wanted = (
        several
        if family == "all"
        else [choose(name, tuple(by_family), "family") for name in comma_separated(family, "family", "deit,dinov2")]
    )
    for name in wanted:
        if name not in several:
            profile = lab.settings.profile.name
            raise UserError(
                f"{name} has one size at profile {profile} ({by_family[name][0]}): there is nothing to compare",
                f"choose from: {', '.join(several)}",
            )
    passed = comma_separated(methods, "methods", "copy,distill")
    # With all families, leave out a size whose patches do not fit the images.
    series = Series.of_each(
        [name for one in wanted for name in by_family[one]],
        lambda name: gains.study(lab, "sizes", name, passed, claims=claims.of("sizes")),
        leave_out=family == "all",
    )
    return replace(series, figure="gains")
