"""Classify a contrast, and describe it in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from atdiag.stats.contrasts import Estimate


def effect(estimate: Estimate) -> str:
    """Format an estimate: ``+3.1 points [1.2, 5.0]``, ``+0.31 log-odds [+0.12, +0.50]``."""
    form = f"+.{estimate.digits}f"
    return f"{estimate.value:{form}} {estimate.scale} [{estimate.low:{form}}, {estimate.high:{form}}]"


Outcome = Literal["gains", "fails", "undecided"]


def outcome(estimate: Estimate) -> Outcome:
    """Classify a contrast with the baseline: clearly above zero, clearly below, or neither."""
    return "undecided" if not estimate.clear else "gains" if estimate.value > 0 else "fails"


def odds(name: str) -> str:
    """Return the name of a contrast's counterpart in log-odds."""
    return f"{name}, log-odds"


def agree(one: Estimate, other: Estimate) -> bool:
    """Return whether two estimates, as of one contrast on two scales, are both clear and of one sign."""
    return one.clear and other.clear and one.value * other.value > 0


def verb_phrase(
    estimate: Estimate, better: str, worse: str, same: str = "can't be told from noise", be: str = "is"
) -> str:
    """Return a verb phrase for an estimate, with its numbers; "undecided" if it may have no verdict.

    An interval that includes zero does not show that there is no effect, so no phrase says that.
    """
    if why := no_verdict(estimate):
        return f"{be} undecided {why} ({effect(estimate)}{', images only' if estimate.seeds == 1 else ''})"
    phrase = same if not estimate.clear else better if estimate.value > 0 else worse
    if estimate.within is not None:
        return f"makes no difference of {estimate.within:g} points ({effect(estimate)}, {estimate.seeds} seeds)"
    return f"{phrase} ({effect(estimate)}, {estimate.seeds} seeds)"


def no_verdict(estimate: Estimate) -> str:
    """Return why an estimate may have no verdict, as a phrase after "undecided"; empty if it may."""
    if estimate.decides:
        return ""
    if estimate.undertrained:
        return "beside an undertrained baseline"
    return f"with {'one seed' if estimate.seeds == 1 else 'two seeds'}"
