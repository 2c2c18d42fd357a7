"""What in the maps matters: the same maps, averaged over examples, queries, heads or layers before they are given.

Li et al. 2024: averaged over examples or over queries, the maps lose most of their benefit.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.study.builder import Lab
from atdiag.study.protocol import Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

DIMENSIONS = ("examples", "queries", "heads", "layers")


@ablation(
    order=130,
    reproduce={"teacher": "deit_s,mae_b"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "over": "examples,queries"},
    papers=("2024",),
)
def averages(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    over: Annotated[
        str, typer.Option("--over", help="Some of examples, queries, heads, layers.")
    ] = "examples,queries,heads,layers",
) -> Study:
    """Average the teacher's maps first: what is then lost?

    Over examples, queries, heads or layers.
    """
    names = comma_separated(over, "over", "examples,queries")
    for name in names:
        choose(name, DIMENSIONS, "over")
    if lab.settings.profile.transfer.average is not None:
        raise UserError("`transfer.average` averages the maps that averaged ones are compared with", "leave it out")
    source = lab.teacher(teacher)
    student = lab.student(source)

    def arm(name: str) -> Arm:
        at = lab if name == "as they are" else lab.under("transfer.average", name)
        return lab.arm(_named(name), student, source, transfer=at.transfer(transfer, student))

    def verdict(report: Report) -> str:
        whole = verb_phrase(report.row(_named("as they are")).contrast_or_raise(), "helps", "hurts")
        said = [f"over {name} {verb_phrase(report.contrasts[_lost(name)], 'gains', 'loses')}" for name in names]
        return f"{transfer.capitalize()} of the maps of {source.label} {whole}; averaging {'; '.join(said)}."

    return Study(
        ablation="averages",
        teacher=source,
        options={"transfer": transfer, "over": ",".join(names)},
        arms=(lab.baseline(source), arm("as they are"), *map(arm, names)),
        contrasts=tuple(Contrast(_lost(name), {_named(name): 1, _named("as they are"): -1}) for name in names),
        verdict=verdict,
        claims=claims.of("averages"),
        reference=lab.reference(source),
    )


def _named(name: str) -> str:
    return "maps" if name == "as they are" else f"maps averaged over {name}"


def _lost(name: str) -> str:
    return f"averaged over {name} minus as they are"
