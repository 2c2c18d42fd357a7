"""Whose maps, and from where does the student start? Every teacher's maps for a random and for a pre-trained student.

Li et al. 2024: what the student gains is decided by whose maps it is given, and the best student is a random one with
the best maps. Maps of an untrained network of the same architecture are the control. A run's student, such as a
fine-tuned one, is one more teacher: ``--others run:ID``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec import Init, Operation, Teacher
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, METHODS, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.settings import SEEDS
from atdiag.study.verdicts import verb_phrase

OWN, UNTRAINED, NONE = "pre-trained", "untrained", "no"
STARTS = ("random", "pre-trained")
"""Of the student: random, or the weights of the first teacher."""
OTHERS = {"mini": "", "small": "dino_s", "paper": "dino_s"}
"""Other pre-trainings of DeiT-S's architecture, which every miniature of it shares with it."""
_UNTRAINED_SEED = SEEDS + 1
"""Outside the seeds of any study: a student of the same seed would be given its own initial maps."""


@ablation(
    order=134,
    reproduce={"teacher": "deit_s"},
    mini={"teacher": "deit_s"},
    quick={"teacher": "deit_s", "others": "none"},
    papers=("2024",),
)
def grid(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_s.")] = "deit_s",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    others: Annotated[
        str | None,
        typer.Option("--others", help="Further teachers, such as dino_s; none. [default: those of the profile]"),
    ] = None,
) -> Study:
    """Give several maps to two starts: which of the two decides?"""
    choose(transfer, METHODS, "transfer")
    source = lab.teacher(teacher)
    student = lab.student(source)
    usual = OTHERS.get(lab.settings.profile.name, "") if others is None else others
    named = () if usual in ("", "none") else comma_separated(usual, "others", "dino_s")
    maps = {OWN: source, **{name: lab.teacher(name) for name in named}, UNTRAINED: untrained(source)}
    for name, one in maps.items():
        if name != OWN and one.weights == source.weights:
            raise UserError(f"`others` {name} is `teacher` itself", "name another one, or none")
    passed = lab.transfer(transfer, student)

    def arm(name: str, start: str) -> Arm:
        if start == "random":
            return lab.arm(_cell(name, start), student, maps[name], transfer=passed)
        weights = Init(source="teacher")  # one recipe for all that start from them: they differ in the maps alone
        if name == NONE:
            return lab.arm(_cell(name, start), student, source, weights, recipe="finetune")
        return lab.arm(_cell(name, start), student, maps[name], weights, passed, recipe="finetune", start=source)

    cells = [(name, start) for start in STARTS for name in (NONE, *maps) if (name, start) != (NONE, "random")]
    best = _cell(OWN, "random")

    def verdict(report: Report) -> str:
        said = [
            f"maps of {source.label} instead of untrained ones, {start} start, "
            + verb_phrase(report.contrasts[_decide(start)], "help", "hurt", be="are")
            for start in STARTS
        ]
        top = max(report.rows, key=lambda row: row.top1)
        return f"{'; '.join(said)}. The highest of all cells is {top.arm} ({top.top1:.1f} %), chosen after the fact."

    return Study(
        ablation="grid",
        teacher=source,
        options={"transfer": transfer, "others": ",".join(named) or "none"},
        arms=(lab.baseline(source), *(arm(*cell) for cell in cells)),
        contrasts=(
            *(Contrast(_decide(start), {_cell(OWN, start): 1, _cell(UNTRAINED, start): -1}) for start in STARTS),
            *(
                Contrast(f"{best} minus {_cell(*cell)}", {best: 1, _cell(*cell): -1})
                for cell in cells
                if _cell(*cell) != best
            ),
        ),
        verdict=verdict,
        figure="grid",
        together="gains",
        claims=claims.of("grid"),
        reference=lab.reference(source),
        notes=(
            f"{BASELINE} has no maps and a random start. Students that start from the weights of {source.label} are "
            "all trained by the recipe of fine-tuning.",
        ),
    )


def untrained(teacher: Teacher) -> Teacher:
    """Return an untrained network of a teacher's architecture, of a seed that no study has."""
    return teacher.model_copy(update={"operation": Operation(name="untrained", seed=_UNTRAINED_SEED)})


def _cell(maps: str, start: str) -> str:
    return f"{maps} maps, {start} start"


def _decide(start: str) -> str:
    return f"{OWN} minus {UNTRAINED} maps, {start} start"
