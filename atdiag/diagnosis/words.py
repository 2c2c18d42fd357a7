"""A diagnosis in words: the verdict, the numbers behind it, what to do, and what was not tested."""

from __future__ import annotations

from dataclasses import dataclass, replace

from atdiag.core.text import count, listed
from atdiag.diagnosis.asking import Conclusion
from atdiag.diagnosis.judging import Finding
from atdiag.diagnosis.planning import Plan
from atdiag.stats.contrasts import Estimate, seeds_needed
from atdiag.study import chance
from atdiag.study.protocol import BASELINE


@dataclass(frozen=True)
class Said:
    """A diagnosis in sentences and rows."""

    headline: str
    """The verdict in one sentence."""
    numbers: tuple[tuple[str, str], ...]
    """The numbers behind it: what, and how much."""
    advice: tuple[str, ...]
    """What to do, as sentences with lines to type."""
    others: tuple[str, ...]
    """What was asked and not accused, and what was not asked."""


def say(plan: Plan, found: Conclusion) -> Said:
    """Put a conclusion into words."""
    return Said(
        _headline(plan, found), tuple(_numbers(plan, found)), tuple(_advice(plan, found)), tuple(_others(plan, found))
    )


def points(estimate: Estimate) -> str:
    """Format a contrast: ``-18.3 [-21.2, -15.3], 5 seeds``."""
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}], {count(estimate.seeds, 'seed')}"


def _headline(plan: Plan, found: Conclusion) -> str:
    label, transfer = plan.subject.teacher.label, plan.subject.transfer
    own = found.last.transfers[plan.subject.outline.names.standard]
    clear = "hurts" if own.value < 0 and own.p < found.last.look.level else "does not help"
    margin = f"{plan.subject.margin:g} points"
    match found.verdict:
        case "transfers":
            return f"The attention of {label} transfers: {transfer} helps a standard student."
        case "fails" if found.causes:
            return f"The attention of {label} fails to transfer: {transfer} {clear}, because of {listed(found.causes)}."
        case "fails":
            return f"The attention of {label} fails to transfer: {transfer} hurts, and no cause is shown."
        case "no difference":
            return f"{transfer.capitalize()} of the attention of {label} makes no difference of {margin}."
        case "undertrained":
            return f"Undertrained: scratch is too near chance, so nothing can be said of {label}."
        case "weak teacher":
            return (
                f"{label} is too weak a teacher here: {transfer} {clear}, "
                "which may be its weakness and says nothing of its architecture."
            )
    return f"Undecided: {transfer} of the attention of {label} can't be told from noise, and no cause is shown."


def _numbers(plan: Plan, found: Conclusion) -> list[tuple[str, str]]:
    own = plan.subject.outline.names.standard
    out = [
        (f"{arm.removeprefix('standard + ')} minus scratch", points(one)) for arm, one in found.last.transfers.items()
    ]
    if not out[0][0].startswith(own.removeprefix("standard + ")):
        out.reverse()
    out += [(one.hypothesis.name, points(one.parts[0])) for one in found.last.findings if one.state == "accused"]
    if (enough := found.sufficient) is not None:
        out.append((f"{listed(enough.components)} minus standard", points(enough.against_standard)))
    return out


def _advice(plan: Plan, found: Conclusion) -> list[str]:
    teacher, transfer = plan.subject.teacher.name, plan.subject.transfer
    out: list[str] = []
    if found.verdict == "transfers":
        out.append(f"Use it: atdiag benchmark --teacher {teacher} compares it with fine-tuning.")
    if (enough := found.sufficient) is not None:
        some = listed(enough.components)
        if enough.confirmed:
            seeds = count(len(enough.seeds), "further seed")
            out.append(f"Give the student {some}: that is sufficient, confirmed on {seeds}.")
        else:
            out.append(f"Give the student all native components; {some} alone was not confirmed to be enough.")
        out.append(f"The arms one by one: atdiag rescue --teacher {teacher} --transfer {transfer}")
    for name in found.causes:
        if name == "the maps":
            out.append("Choose another teacher: these maps are worth little to any student.")
        elif name.startswith("blocks "):
            first, last = map(int, name.removeprefix("blocks ").split("-"))
            keep = [n for n in range(plan.subject.outline.depth) if not first <= n <= last]
            out.append(f"Leave these blocks out: --set transfer.layers={keep[0]}-{keep[-1]}")
        elif name == "the loss":
            out.append("Copy instead of distilling (--transfer copy), or give the loss less weight.")
        elif name.startswith("the start"):
            out.append(f"Do not start from these weights: atdiag reinit --module all --teacher {teacher}")
    if found.verdict == "weak teacher":
        out.append("Take a stronger teacher, or ask with fewer images or epochs, where the student knows less.")
    if found.verdict == "undertrained":
        out.append(f"Train longer: --set recipe.epochs={2 * plan.subject.arm(BASELINE).specs[0].recipe.epochs}")
    if found.verdict == "undecided":
        out.append(_settle(found, plan))
    return out


def _settle(found: Conclusion, plan: Plan) -> str:
    own = found.last.transfers[plan.subject.outline.names.standard]
    strict = replace(own, level=1 - found.last.look.level)
    needed = seeds_needed(strict) if own.seeds > 1 else None
    if needed is None:
        return "More than 1,000 seeds would be needed: more test images, or longer training, would tell."
    return f"About {count(needed, 'seed')} would settle it, if the effect is as estimated: --looks {needed}"


def _others(plan: Plan, found: Conclusion) -> list[str]:
    by_state: dict[str, list[str]] = {"cleared": [], "not accused": []}
    for one in found.last.findings:
        if one.state != "accused":
            by_state[one.state].append(_with_number(one))
    out = []
    if by_state["cleared"]:
        out.append(f"Cleared (within {plan.subject.margin:g} points): {'; '.join(by_state['cleared'])}.")
    if by_state["not accused"]:
        out.append(f"Not accused, which is not cleared: {'; '.join(by_state['not accused'])}.")
    if not found.last.findings:
        why = {
            "transfers": "there is no failure to explain",
            "undertrained": chance.UNDERTRAINED,
            "weak teacher": "its teacher explains it",
        }
        out.append(f"No cause was asked about: {why.get(found.verdict, 'nothing was to be explained')}.")
        return out
    out += [f"Not asked: {what} ({why})." for what, why in plan.subject.outline.not_asked.items()]
    return out


def _with_number(one: Finding) -> str:
    return f"{one.hypothesis.name} ({points(one.parts[0])})"
