"""Claims of papers, as data, and their verdicts here.

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
    """A paper's claim about contrasts of an ablation."""

    name: str
    """Short name for tables: ``benchmark: four fail``."""
    text: str
    paper: str
    """The paper's numbers, as stated in the source."""
    source: str
    arms: tuple[str, ...] = ()
    """Arms, each minus its baseline; names may contain ``*`` as a wildcard."""
    contrasts: tuple[str, ...] = ()
    """Further contrasts of the ablation, likewise."""
    direction: Literal["above", "below"] | None = None
    """Relative to zero. A claim that is not about contrasts has none, and the ablation's own findings judge it."""
    families: tuple[str, ...] = ()
    """Families of teachers; empty: any."""
    failing: tuple[str, ...] = ()
    """Restrict to teachers for which these arms are clearly below their baseline: only a failure can be reversed."""

    @model_validator(mode="after")
    def _has_a_direction(self) -> Self:
        if bool(self.arms or self.contrasts) != (self.direction is not None):
            raise ValueError(
                f"{self.name}: a claim about arms or contrasts needs a direction, and no other claim has one"
            )
        return self


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict. ``low`` and ``high`` span all intervals that it was judged by."""

    claim: Claim
    verdict: Verdict
    ours: str
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    note: str = ""
    """What was not tested, and why."""


def read(path: Path) -> dict[str, tuple[Claim, ...]]:
    """Read a claims file: for each ablation a list of tables with the fields of :class:`Claim`."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return {ablation: tuple(Claim.model_validate(claim) for claim in claims) for ablation, claims in content.items()}
