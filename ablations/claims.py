"""The papers' claims, by ablation: ``claims.toml``, read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from atdiag.study import claims
from atdiag.study.claims import Claim


def of(ablation: str) -> tuple[Claim, ...]:
    """What papers say that this ablation tests."""
    return _all().get(ablation, ())


@cache
def _all() -> dict[str, tuple[Claim, ...]]:
    return claims.read(Path(__file__).with_name("claims.toml"))
