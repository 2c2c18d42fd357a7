"""Decide from right and wrong answers alone: what a look shows, and which components suffice.

No run, store or network is known here, so that simulated studies go through the same lines as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atdiag.diagnosis.hypotheses import Hypothesis, Names, Outline
from atdiag.stats.contrasts import Estimate, Outcomes, equivalent, estimate, one_sided
from atdiag.stats.sequential import Look
from atdiag.study.protocol import BASELINE

Answers = Callable[[Sequence[str], range], Mapping[str, Outcomes]]
"""The answers of some arms with some seeds (numbers from 0, in the study's order of seeds)."""

EQUIVALENCE = 0.05
"""Level of each of the two one-sided tests that clear a suspect, and of a component's non-inferiority."""

State = Literal["accused", "cleared", "not accused"]


@dataclass(frozen=True)
class Tested:
    """What a look shows of one hypothesis."""

    hypothesis: Hypothesis
    parts: tuple[Estimate, ...]
    """The estimate of each of its parts."""
    p: float
    """One-sided, of the part that is shown least."""
    state: State


@dataclass(frozen=True)
class LookResult:
    """What one look shows."""

    look: Look
    transfers: Mapping[str, Estimate]
    """Arm -> its contrast with scratch: the standard student that copies, and the one that distils."""
    findings: tuple[Tested, ...] = ()
    """Of what was asked; empty where the transfer helps, or nothing may be said."""

    @property
    def accused(self) -> tuple[str, ...]:
        """The names of the rejected hypotheses."""
        return tuple(one.hypothesis.name for one in self.findings if one.state == "accused")


def effect(estimate: Estimate, level: float) -> Literal["helps", "hurts", "unclear"]:
    """Return what a contrast with scratch shows at a two-sided level; with fewer than three seeds, nothing."""
    if not estimate.decides or estimate.p >= level:
        return "unclear"
    return "helps" if estimate.value > 0 else "hurts"


def transfers(answers: Answers, outline: Outline, look: Look) -> LookResult:
    """Compare the standard students that copy and distil with the one from scratch."""
    got = answers(outline.first, range(look.seeds))
    return LookResult(look, {arm: estimate(got, {arm: 1, BASELINE: -1}) for arm in outline.first if arm != BASELINE})


def accuse(answers: Answers, outline: Outline, shown: LookResult) -> LookResult:
    """Ask about every accusation at a look, and about what opens once one is made."""
    look, graph, follow_ups = shown.look, outline.graph, outline.follow_ups
    asked = [one for family in outline.families for one in family]
    p_values: dict[str, float] = {}
    parts: dict[str, tuple[Estimate, ...]] = {}
    rejected: tuple[str, ...] = ()
    while asked:
        arms = dict.fromkeys(arm for one in asked for arm in one.arms)
        got = answers(list(arms), range(look.seeds))
        for one in asked:
            parts[one.name] = tuple(estimate(got, part.weights) for part in one.parts)
            p_values[one.name] = p_value(one, parts[one.name])
        rejected = graph.rejected(p_values, look.level)
        opened = [one for name in rejected for one in follow_ups.get(name, ())]
        asked = [one for one in opened if one.name not in p_values]
    known = outline.hypotheses
    findings = tuple(
        Tested(known[name], of, p_values[name], _state(known[name], of, name in rejected, outline.margin))
        for name, of in parts.items()
    )
    return LookResult(look, shown.transfers, findings)


def p_value(hypothesis: Hypothesis, parts: Sequence[Estimate]) -> float:
    """Return the p-value of a hypothesis: the largest of its parts; 1 where an estimate may have no verdict."""
    if not all(one.decides for one in parts):
        return 1.0
    return max(one_sided(one, part.side, part.bound) for one, part in zip(parts, hypothesis.parts, strict=True))


def _state(hypothesis: Hypothesis, parts: Sequence[Estimate], rejected: bool, margin: float) -> State:
    """Return whether a hypothesis accuses, or its opposite is shown: an effect within the margin, or beyond its bound.

    Its first part decides on clearing: the difference that the accusation is about.
    """
    if rejected:
        return "accused"
    part, found = hypothesis.parts[0], parts[0]
    if part.bound:
        opposite: Literal["above", "below"] = "above" if part.side == "below" else "below"
        clear = found.decides and one_sided(found, opposite, part.bound) <= EQUIVALENCE
    else:
        clear = equivalent(found, margin)
    return "cleared" if clear else "not accused"


# --- a sufficient set ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sufficient:
    """A set of native components, and whether it is enough."""

    components: tuple[str, ...]
    dropped: Mapping[str, Estimate]
    """Component -> the student without it minus the native one: non-inferior, so it was left out."""
    kept: Mapping[str, Estimate]
    """The same for those that were kept."""
    seeds: range
    """The seeds on which it was confirmed; none of them was used to choose it."""
    against_native: Estimate | None
    """The chosen student minus the native one; None if they are the same."""
    against_standard: Estimate
    """The chosen student minus the standard one, both with transfer."""
    margin: float

    @property
    def confirmed(self) -> bool:
        """Whether it is clearly above the standard student, and not below the native one by the margin."""
        above = self.against_standard.decides and one_sided(self.against_standard, "above") <= EQUIVALENCE
        return above and (self.against_native is None or non_inferior(self.against_native, self.margin))


def non_inferior(estimate: Estimate, margin: float) -> bool:
    """Return whether a contrast is above minus the margin, by a one-sided test."""
    return estimate.decides and one_sided(estimate, "above", -margin) <= EQUIVALENCE


def sufficient(answers: Answers, outline: Outline, used: int, fresh: int) -> Sufficient:
    """Leave out each component without which the student is not inferior, and confirm what is left on fresh seeds.

    used: seeds on which the choice is made; fresh: further ones for the confirmation. If every component could be
    left out alone, the one that is worth most alone is kept. What is found is sufficient, not smallest.
    """
    n, own, seeds = outline.names, outline.components, range(used)
    without = {name: n.given(other for other in own if other != name) for name in own}
    got = answers([n.native, *without.values()], seeds)
    cost = {name: estimate(got, {arm: 1, n.native: -1}) for name, arm in without.items()}
    chosen = tuple(name for name in own if not non_inferior(cost[name], outline.margin))
    if not chosen:
        chosen = (_best(answers, n, own, seeds),)
    arm, later = n.given(chosen), range(used, used + fresh)
    anew = answers(list(dict.fromkeys([arm, n.native, n.standard])), later)
    return Sufficient(
        components=chosen,
        dropped={name: one for name, one in cost.items() if name not in chosen},
        kept={name: one for name, one in cost.items() if name in chosen},
        seeds=later,
        against_native=None if arm == n.native else estimate(anew, {arm: 1, n.native: -1}),
        against_standard=estimate(anew, {arm: 1, n.standard: -1}),
        margin=outline.margin,
    )


def _best(answers: Answers, names: Names, components: Iterable[str], seeds: range) -> str:
    alone = {name: names.given([name]) for name in components}
    got = answers([*alone.values(), names.standard], seeds)
    return max(alone, key=lambda name: estimate(got, {alone[name]: 1, names.standard: -1}).value)
