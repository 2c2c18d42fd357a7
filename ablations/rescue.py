"""Give the student its teacher's native components, randomly initialised: does the transfer then work?

Qin et al. 2026: with all native components all four failures are reversed, although a student with the components
trained from scratch is worse than the standard one. The quantity of interest is therefore a difference of differences:
the gain of transfer in the native student minus that in the standard one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from ablations import claims, found
from atdiag.core.errors import UserError
from atdiag.core.spec import Network, Teacher, Transfer
from atdiag.networks.model.acting import matters, why_idle
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, Contrast, Report, Study
from atdiag.study.registry import ablation
from atdiag.study.verdicts import effect, no_verdict, verb_phrase

OF_INTEREST = "rescue: (native + transfer - native) - (standard + transfer - scratch)"


@ablation(
    order=90,
    reproduce={"teacher": "dinov2_s,dinov2_reg_s,clip_b,beitv2_b"},
    quick={"teacher": "dinov2_s"},
)
def rescue(
    lab: Lab,
    teacher: Annotated[str, typer.Option(help="Teachers, such as clip_b; all: every one.")] = "clip_b",
    transfer: Annotated[str, typer.Option(help="The transfer: copy or distill.")] = "copy",
) -> Study:
    """Add native components to the student: do they rescue it?

    All of the teacher's native components, each alone, all but one; each student without and with transfer.
    """
    source = lab.teacher(teacher)
    has_native_student(source, "rescue")
    own = source.network.components
    standard, native = lab.student(source), lab.student(source, own)
    passed = lab.transfer(transfer, standard)
    plain, full, control = f"standard + {transfer}", f"native + {transfer}", "native, scratch"
    idle = {name: why for name in own if (why := why_idle(name, passed, native))}
    if len(idle) == len(own):
        raise UserError(
            f"under {transfer} no native component of {source.label} can change the student, so none can rescue it "
            f"({_reasons(idle)})",
            "choose another teacher" if own == ("no_k_bias",) else "give `transfer` distill",
        )
    wanted = {f"{name} + {transfer}": lab.student(source, [name]) for name in own}
    wanted |= {f"all but {name} + {transfer}": lab.student(source, set(own) - {name}) for name in own}
    some, twins = _distinct({plain: standard, full: native}, wanted, passed)

    def verdict(report: Report) -> str:
        return (
            f"{transfer.capitalize()} from {source.label} into a standard student "
            f"{verb_phrase(report.row(plain).contrast_or_raise(), 'helps', 'hurts')}; "
            f"native components change what it gains by {effect(report.contrasts[OF_INTEREST])} "
            f"{_said(report, plain)}{_named(report, plain, full)}; the components alone, from scratch, "
            f"{verb_phrase(report.row(control).contrast_or_raise(), 'help', 'hurt', be='are')}."
        )

    return Study(
        ablation="rescue",
        teacher=source,
        options={"transfer": transfer},
        arms=(
            lab.baseline(source),
            lab.arm(plain, standard, source, transfer=passed),
            *(lab.arm(name, network, source, transfer=passed) for name, network in some.items()),
            lab.arm(full, native, source, transfer=passed),
            lab.arm(control, native),
        ),
        contrasts=(
            Contrast(OF_INTEREST, {full: 1, control: -1, plain: -1, BASELINE: 1}),
            Contrast("transfer in the native student", {full: 1, control: -1}),
            Contrast("native minus standard, both with transfer", {full: 1, plain: -1}),
        ),
        verdict=verdict,
        together="rescue",
        claims=claims.of("rescue"),
        reference=lab.reference(source),
        notes=(
            f"Native components of {source.label}: {', '.join(own)}; in the student all start at random.",
            *([_untrained(idle, twins)] if idle else []),
            *(
                [f"In {control}, {' and '.join(alone)} can matter."]
                if (alone := sorted(idle.keys() & _acting(native)))
                else []
            ),
        ),
    )


def has_native_student(source: Teacher, experiment: str) -> None:
    """Raise UserError for a teacher whose native student does not exist, or is its standard one."""
    own, beyond = source.network.components, source.network.differences
    if beyond:
        raise UserError(
            f"{source.label} has {', '.join(beyond)}, which no student can be given yet: there is no native student",
            "choose another teacher, or another experiment: all but reinit take this one",
        )
    if not own:
        raise UserError(
            f"{source.label} has no native component, so there is nothing to add: "
            "its standard student is its native one",
            f"the same line with 'benchmark' for {experiment!r} shows whether its attention transfers",
        )


def _distinct(
    known: Mapping[str, Network], wanted: Mapping[str, Network], transfer: Transfer
) -> tuple[dict[str, Network], dict[str, str]]:
    """Split the requested students into distinct ones and the rest, each with the arm that it equals.

    Two students are equal under a transfer if they have the same components among those that can matter. A network
    that already has a name is not named again: with two components, "all but one" is "only the other".
    """
    planned, twins = dict(known), dict[str, str]()
    named = list(known.values())
    by_acting = {_acting(network, transfer): name for name, network in known.items()}
    for name, network in wanted.items():
        if network in named:
            continue
        named.append(network)
        twin = by_acting.setdefault(_acting(network, transfer), name)
        if twin == name:
            planned[name] = network
        else:
            twins[name] = twin
    return {name: network for name, network in planned.items() if name not in known}, twins


def _acting(network: Network, transfer: Transfer | None = None) -> frozenset[str]:
    """Return the components of a student that can matter under a transfer, or without any."""
    transfer = transfer or Transfer()
    return frozenset(name for name in network.components if matters(name, transfer, network))


def _reasons(idle: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in idle.items())


def _untrained(idle: Mapping[str, str], twins: Mapping[str, str]) -> str:
    """Describe the components that can't matter under the transfer, and the arms that are therefore not trained."""
    said = f"Can't matter under this transfer: {_reasons(idle)}."
    same = "; ".join(f"{name} would be the run of {twin}" for name, twin in twins.items())
    return f"{said} Not trained: {same}." if same else said


def _named(report: Report, plain: str, full: str) -> str:
    """Name the components that alone reverse a clear failure, as they follow the difference of differences."""
    said = found.rescue(report, plain, full, OF_INTEREST)
    if said in (found.TRANSFERS, found.FAILS, found.WEAK, found.UNDECIDED):
        return ""
    names = found.alone(report, plain)
    if said == found.NOT_RESCUED:
        return ", and no component rescues it"
    if not names:
        return ", which no single component does"
    return f", and {' and '.join(names)} alone {'reverses' if len(names) == 1 else 'reverse'} the failure"


def _said(report: Report, plain: str) -> str:
    """Describe the difference of differences; only a transfer that does not help can be rescued."""
    estimate, standard = report.contrasts[OF_INTEREST], report.row(plain).contrast_or_raise()
    if why := no_verdict(estimate):
        return f"(undecided {why})"
    if not estimate.clear:
        return "(within noise)"
    if standard.clear and standard.value > 0:
        return "(clear of zero, but there was no failure to rescue)"
    return "(a rescue)" if estimate.value > 0 else "(the opposite of a rescue)"
