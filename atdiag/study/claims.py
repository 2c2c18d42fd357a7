"""What papers claim, as data, and the form of what became of it here.

A claim names contrasts: of which teachers, in which direction.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from atdiag.core.spec import Spec

Verdict = Literal["holds", "does not hold", "undecided", "not testable here"]


class Claim(Spec):
    """What a paper says of contrasts of an ablation."""

    name: str
    """Short, for tables: ``benchmark: four fail``."""
    text: str
    paper: str
    """Its numbers, as the source gives them."""
    source: str
    arms: tuple[str, ...] = ()
    """Which arms, minus their baseline: names, ``*`` standing for anything."""
    contrasts: tuple[str, ...] = ()
    """Which further contrasts of the ablation, likewise."""
    direction: Literal["above", "below"] | None = None
    """Of zero. A claim about something else than contrasts names none, and an ablation's own findings judge it."""
    families: tuple[str, ...] = ()
    """Of which teachers; empty: of any."""
    failing: tuple[str, ...] = ()
    """Only of teachers whose arms of these names are clear below their baseline: nothing else can be reversed."""

    @model_validator(mode="after")
    def _has_a_direction(self) -> Self:
        if bool(self.arms or self.contrasts) != (self.direction is not None):
            raise ValueError(
                f"{self.name}: a claim about arms or contrasts needs a direction, and no other claim has one"
            )
        return self


@dataclass(frozen=True)
class Judged:
    """A claim and what became of it. ``low`` and ``high`` span all intervals that it was judged by."""

    claim: Claim
    verdict: Verdict
    ours: str
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    note: str = ""
    """What was not tested, and why."""


def read(path: Path) -> dict[str, tuple[Claim, ...]]:
    """A claims file: for each ablation a list of tables with the fields of :class:`Claim`."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return {ablation: tuple(Claim.model_validate(claim) for claim in claims) for ablation, claims in content.items()}
