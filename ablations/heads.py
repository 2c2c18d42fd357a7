"""How many heads must be transferred, and which?

Li et al. 2024: copying more heads gains more, up to about 12 of the 16 of a ViT-L; beyond them the curve is flat. Heads
that take nothing from the teacher are trained freely.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ablations import claims
from atdiag.core.errors import UserError
from atdiag.core.selection import choose, comma_separated
from atdiag.core.spec import Network, Seed, Teacher
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Arm, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import verb_phrase

RULES = ("first", "random", "different")
"""``random``: of the same heads in every block, a draw for each model seed, in which fewer heads are among more.
``different``: block by block, those that differ most by their maps (``transfer.different_heads``)."""
_ALL = "all heads"


@ablation(
    order=125,
    reproduce={"teacher": "deit_b,mae_b", "which": "first,random,different"},
    mini={"teacher": "deit_b", "which": "first,random,different"},
    quick={"teacher": "deit_b"},
    papers=("2024",),
)
def heads(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as deit_b.")] = "deit_b",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
    which: Annotated[str, typer.Option("--which", help="Some of first, random, different.")] = "first",
    counts: Annotated[
        str | None, typer.Option("--counts", help="How many heads, such as 4,8,12. [default: 1/4, 1/2, 3/4 of them]")
    ] = None,
) -> Study:
    """Transfer some heads only: how many are needed, and which?"""
    rules = comma_separated(which, "which", "first,random")
    for rule in rules:
        choose(rule, RULES, "which")
    source = lab.teacher(teacher)
    student = lab.student(source)
    every = student.heads
    asked = _usual(every) if counts is None else _numbers(counts, source.label, every)
    some = [count for count in asked if count < every]
    unset = lab.under("transfer.heads", None).under("transfer.different_heads", None)
    parts = [(rule, count) for count in some for rule in rules]
    made = {_name(*part): _arm(unset, *part, transfer, source, student) for part in parts}
    whole = unset.arm(_ALL, student, source, transfer=unset.transfer(transfer, student))

    def verdict(report: Report) -> str:
        said = [f"{name} {verb_phrase(report.row(name).contrast_or_raise(), 'helps', 'hurts')}" for name in made]
        said.append(f"all {every} {verb_phrase(report.row(_ALL).contrast_or_raise(), 'helps', 'hurts')}")
        said += [
            f"the last {every - some[-1]} beyond {rule} {some[-1]} "
            + verb_phrase(
                report.contrasts[_share(rule, some[-1])], "give more than their share", "give less than their share"
            )
            for rule in (rules if some else ())
        ]
        return f"{transfer.capitalize()} of heads of {source.label}: {'; '.join(said)}."

    return Study(
        ablation="heads",
        teacher=source,
        options={"transfer": transfer, "which": ",".join(rules)},
        arms=(lab.baseline(source), *made.values(), whole),
        contrasts=_contrasts(rules, some, every),
        verdict=verdict,
        figure="head_curve",
        together="head_curves",
        claims=claims.of("heads"),
        reference=lab.reference(source),
        notes=("Random heads are drawn for each seed: their interval covers the draw.",) if "random" in rules else (),
        curve={BASELINE: 0, **{_name(*part): part[1] for part in parts}, _ALL: every},
    )


def drawn(seed: Seed, count: int, every: int) -> tuple[int, ...]:
    """Return ``count`` of ``every`` heads, drawn for a model seed; fewer are among more of the same seed."""
    from atdiag.core import randomness

    order = randomness.generator(seed.model, "heads").permutation(every)
    return tuple(sorted(int(head) for head in order[:count]))


def _arm(lab: Lab, rule: str, count: int, transfer: str, source: Teacher, student: Network) -> Arm:
    """Return the arm of some heads. With ``random``, each seed has heads of its own."""

    def under(lab: Lab, name: str, value: int | tuple[int, ...]) -> Arm:
        lab = lab.under(f"transfer.{name}", value)
        return lab.arm(_name(rule, count), student, source, transfer=lab.transfer(transfer, student))

    if rule == "different":
        return under(lab, "different_heads", count)
    if rule == "first":
        return under(lab, "heads", tuple(range(count)))
    seeds = lab.settings.seeds
    alone = [Lab(replace(lab.settings, seeds=(seed,))) for seed in seeds]
    arms = [under(one, "heads", drawn(seed, count, student.heads)) for one, seed in zip(alone, seeds, strict=True)]
    return replace(arms[0], specs=tuple(spec for arm in arms for spec in arm.specs))


def _contrasts(rules: tuple[str, ...], some: list[int], every: int) -> tuple[Contrast, ...]:
    """Return all heads minus the fewest, what the last heads add beside their share, and each rule minus the first."""
    if not some:
        return ()
    least, most = some[0], some[-1]
    rest = (every - most) / every
    grows = [Contrast(f"{_ALL} minus {_name(rule, least)}", {_ALL: 1, _name(rule, least): -1}) for rule in rules]
    # (all - most) - rest (all - scratch): zero if each head added as much as any other
    flat = [Contrast(_share(rule, most), {_ALL: 1 - rest, _name(rule, most): -1, BASELINE: rest}) for rule in rules]
    first, *others = rules
    apart = [
        Contrast(f"{_name(rule, count)} minus {_name(first, count)}", {_name(rule, count): 1, _name(first, count): -1})
        for rule in others
        for count in some
    ]
    return (*grows, *flat, *apart)


def _share(rule: str, most: int) -> str:
    return f"beyond {_name(rule, most)} minus a proportional share"


def _name(rule: str, count: int) -> str:
    return f"{rule} {count}"


def _usual(every: int) -> list[int]:
    """Return a quarter, a half and three quarters of the heads, rounded, each once.

    >>> _usual(16), _usual(6), _usual(3)
    ([4, 8, 12], [2, 3, 4], [1, 2])
    """
    return sorted({max(1, round(every * part / 4)) for part in (1, 2, 3)} - {every})


def _numbers(text: str, label: str, every: int) -> list[int]:
    parts = comma_separated(text, "counts", "4,8,12")
    for part in parts:
        if not (part.isascii() and part.isdecimal() and 1 <= int(part) <= every):
            raise UserError(f"`counts` {part!r}: {label} has {every} heads", f"give numbers from 1 to {every}")
    return sorted({int(part) for part in parts})
