"""A diagnosis in words: the verdict, the numbers behind it, what to do, and what was not tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from atdiag.core.selection import ranges
from atdiag.core.text import count, listed
from atdiag.diagnosis.asking import Conclusion
from atdiag.diagnosis.judging import Tested
from atdiag.diagnosis.planning import AnalysisPlan
from atdiag.stats.contrasts import Estimate, seeds_needed
from atdiag.study import chance
from atdiag.study.profiles import OWN_PROFILE
from atdiag.study.protocol import BASELINE


@dataclass(frozen=True)
class Advice:
    """What to do, and the experiment that does it."""

    text: str
    experiment: str = ""
    """Its name; empty: there is none to run."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Its options; a dotted name is a setting."""


@dataclass(frozen=True)
class Said:
    """A diagnosis in sentences and rows."""

    headline: str
    """The verdict in one sentence."""
    numbers: tuple[tuple[str, str], ...]
    """The numbers behind it: what, and how much."""
    advice: tuple[Advice, ...]
    others: tuple[str, ...]
    """What was asked and not accused, and what was not asked."""


def say(plan: AnalysisPlan, found: Conclusion) -> Said:
    """Put a conclusion into words."""
    return Said(
        headline=_headline(plan, found),
        numbers=tuple(_numbers(plan, found)),
        advice=tuple(_advice(plan, found)),
        others=tuple(_others(plan, found)),
    )


def points(estimate: Estimate) -> str:
    """Format a contrast: ``-18.3 [-21.2, -15.3], 5 seeds``."""
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}], {count(estimate.seeds, 'seed')}"


def _headline(plan: AnalysisPlan, found: Conclusion) -> str:
    label, transfer = plan.case.teacher.label, plan.case.transfer
    own = found.last.transfers[plan.case.outline.names.standard]
    clear = "hurts" if own.value < 0 and own.p < found.last.look.level else "does not help"
    margin = f"{plan.case.margin:g} points"
    match found.verdict:
        case "transfers":
            return f"The attention of {label} transfers: {transfer} helps a standard student."
        case "fails" if found.causes:
            return f"The attention of {label} fails to transfer: {transfer} {clear}, because of {causes(plan, found)}."
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


def causes(plan: AnalysisPlan, found: Conclusion) -> str:
    """Name the accused, with what was accused after them in parentheses: ``the architecture (registers)``."""
    opened = plan.case.outline.follow_ups

    def named(name: str) -> str:
        closer = [named(one.name) for one in opened.get(name, ()) if one.name in found.causes]
        said = name.removeprefix("component ")
        return f"{said} ({listed(closer)})" if closer else said

    later = {one.name for some in opened.values() for one in some}
    return listed([named(name) for name in found.causes if name not in later])


def _numbers(plan: AnalysisPlan, found: Conclusion) -> list[tuple[str, str]]:
    own = plan.case.outline.names.standard
    out = [
        (f"{arm.removeprefix('standard + ')} minus scratch", points(one)) for arm, one in found.last.transfers.items()
    ]
    if not out[0][0].startswith(own.removeprefix("standard + ")):
        out.reverse()
    out += [(one.hypothesis.name, points(one.parts[0])) for one in found.last.findings if one.state == "accused"]
    if (enough := found.sufficient) is not None:
        out.append((f"{listed(enough.components)} minus standard", points(enough.against_standard)))
    return out


def _advice(plan: AnalysisPlan, found: Conclusion) -> list[Advice]:
    transfer = plan.case.transfer
    out: list[Advice] = []
    if found.verdict == "transfers":
        out.append(Advice("Compare it with fine-tuning:", "benchmark"))
    if (enough := found.sufficient) is not None:
        some = listed(enough.components)
        if enough.confirmed:
            said = (
                f"Give the student {some}: that is sufficient, confirmed on {count(len(enough.seeds), 'further seed')}."
            )
        else:
            said = f"Give the student all native components: that {some} is enough was not confirmed."
        out += [Advice(said), Advice("See what each component does:", "rescue", {"transfer": transfer})]
    out += [advice for name in found.causes for advice in _against(plan, found, name)]
    match found.verdict:
        case "weak teacher":
            if (size := plan.case.smaller_than) is not None:
                here = plan.case.lab.settings.profile.data.image_size
                larger = f"Show it larger images: it was trained at {size} px, and sees {here} px here:"
                out.append(Advice(larger, "diagnose", {"data.image_size": str(size)}))
            out.append(Advice("Take a stronger teacher, or fewer images or epochs, where a student knows less."))
        case "undertrained":
            epochs = chance.longer(plan.case.arm(BASELINE).specs[0].recipe.epochs)
            out.append(Advice("Train longer:", "diagnose", {"recipe.epochs": str(epochs)}))
        case "undecided":
            out.append(_settle(plan, found))
    return out


def _against(plan: AnalysisPlan, found: Conclusion, cause: str) -> list[Advice]:
    """Return what to do about one cause."""
    transfer, outline = plan.case.transfer, plan.case.outline
    if cause == "the maps":
        worth = f"less than {plan.case.margin:g} points more than their average over images"
        return [Advice(f"Choose another teacher, or train longer: here these maps are worth {worth}.")]
    if cause == "the loss":
        return [Advice("Copy, which has no loss, or give the loss less weight:", "losses")]
    if cause.startswith("the start"):
        return [Advice("Start from random weights, not from this teacher's:", "reinit", {"module": "all"})]
    if (layers := outline.parts.get(cause)) is not None:
        closer = {one.name for one in outline.follow_ups.get(cause, ())}
        if closer & {*found.causes}:
            return []  # the part that was accused is left out instead
        keep = ranges(n for n in range(outline.depth) if n not in layers)
        return [Advice(f"Leave {cause} out:", "benchmark", {"methods": transfer, "transfer.layers": keep})]
    return []


def _settle(plan: AnalysisPlan, found: Conclusion) -> Advice:
    own = found.last.transfers[plan.case.outline.names.standard]
    needed = seeds_needed(replace(own, level=1 - found.last.look.level)) if own.seeds > 1 else None
    if needed is None:
        return Advice("More than 1,000 seeds would be needed: more test images, or longer training, would tell.")
    said = f"About {count(needed, 'seed')} would settle it, if the effect is as estimated:"
    return Advice(said, "diagnose", {"transfer": plan.case.transfer, "looks": str(needed)})


def _others(plan: AnalysisPlan, found: Conclusion) -> list[str]:
    by_state: dict[str, list[str]] = {"cleared": [], "not accused": []}
    for one in found.last.findings:
        if one.state != "accused":
            by_state[one.state].append(_with_number(one))
    out = [f"All of this is of {_length(plan)}."] if plan.case.lab.settings.profile.name == OWN_PROFILE else []
    if by_state["cleared"]:
        out.append(f"Cleared (within {plan.case.margin:g} points): {'; '.join(by_state['cleared'])}.")
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
    out += [f"Not asked: {what} ({why})." for what, why in plan.case.outline.not_asked.items()]
    return out


def _length(plan: AnalysisPlan) -> str:
    """Return how the students were trained: ``students trained for 4 epochs on 600 images of 64 px``."""
    spec = plan.case.arm(BASELINE).specs[0]
    epochs = count(spec.recipe.epochs, "epoch")
    return f"students trained for {epochs} on {spec.data.train:,} images of {spec.network.image_size} px"


def _with_number(one: Tested) -> str:
    return f"{one.hypothesis.name} ({points(one.parts[0])})"
