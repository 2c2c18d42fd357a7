"""The order of the questions: does it transfer, may anything be said, what is accused, what suffices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from atdiag.diagnosis import judging
from atdiag.diagnosis.hypotheses import Outline
from atdiag.diagnosis.judging import Answers, LookResult, Sufficient
from atdiag.stats.contrasts import Estimate, Outcomes, equivalent, estimate
from atdiag.stats.sequential import Look
from atdiag.study.protocol import BASELINE, Footing

Verdict = Literal["transfers", "fails", "no difference", "undecided", "undertrained", "weak teacher"]

FRESH = 5
"""Seeds on which a sufficient set is confirmed."""


@dataclass(frozen=True)
class Conclusion:
    """What a diagnosis found."""

    verdict: Verdict
    """``fails``: it clearly hurts, or it does not help and a cause was found."""
    causes: tuple[str, ...]
    """The accused, in the order in which they were rejected."""
    looks: tuple[LookResult, ...]
    baseline: Estimate
    """Scratch's accuracy in per cent at the last look."""
    footing: Footing
    """How far scratch is above chance at the last look."""
    sufficient: Sufficient | None = None
    """A set of components that is enough, if the architecture was accused."""

    @property
    def last(self) -> LookResult:
        """The last look."""
        return self.looks[-1]


def ask(
    outline: Outline,
    looks: Sequence[Look],
    answers: Answers,
    footing: Callable[[Outcomes], Footing],
    teacher: float | None,
) -> Conclusion:
    """Ask look by look, and stop when the answer is known.

    footing: how far scratch is above chance. teacher: its own accuracy in per cent, None if unknown. A teacher whose
    accuracy is not above the upper limit of scratch is too weak for anything to be said of its architecture.
    """
    own = outline.names.standard
    taken: list[LookResult] = []
    for look in looks:
        shown = judging.transfers(answers, outline, look)
        scratch = answers([BASELINE], range(look.seeds))[BASELINE]
        baseline, stands = estimate({BASELINE: scratch}, {BASELINE: 1}), footing(scratch)

        def end(
            verdict: Verdict,
            last: LookResult,
            causes: tuple[str, ...] = (),
            enough: Sufficient | None = None,
            baseline: Estimate = baseline,
            stands: Footing = stands,
        ) -> Conclusion:
            return Conclusion(verdict, causes, (*taken, last), baseline, stands, enough)

        if stands.undertrained:
            return end("undertrained", shown)
        found = judging.effect(shown.transfers[own], look.level)
        if found == "helps":
            return end("transfers", shown)
        if teacher is not None and teacher <= baseline.high:
            return end("weak teacher", shown)
        shown = judging.accuse(answers, outline, shown)
        if shown.accused:
            enough = None
            if "the architecture" in shown.accused:
                enough = judging.sufficient(answers, outline, look.seeds, FRESH)
            return end("fails", shown, shown.accused, enough)
        if look is looks[-1]:
            if found == "hurts":
                return end("fails", shown)
            same = equivalent(shown.transfers[own], outline.margin)
            return end("no difference" if same else "undecided", shown)
        taken.append(shown)
    raise ValueError("a diagnosis needs at least one look")
