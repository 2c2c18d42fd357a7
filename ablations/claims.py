"""The papers' claims, by ablation: ``claims.toml``, read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from atdiag.study import claims
from atdiag.study.claims import Claim


def of(ablation: str) -> tuple[Claim, ...]:
    """Return the papers' claims about contrasts of this ablation."""
    return tuple(claim for claim in _all().get(ablation, ()) if claim.direction is not None)


def stated(ablation: str, name: str) -> Claim:
    """Return a claim by name that is not about contrasts and that the ablation's own findings judge."""
    return next(claim for claim in _all()[ablation] if claim.name == name and claim.direction is None)


@cache
def _all() -> dict[str, tuple[Claim, ...]]:
    return claims.read(Path(__file__).with_name("claims.toml"))
