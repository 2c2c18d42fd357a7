"""The registry of teachers: a table (``teachers.toml``), and what can be asked of it. Needs no torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from atdiag.networks import weights
from atdiag.spec import Network, Teacher
from atdiag.words import UserError, suggest

_SIZES: dict[str, dict[str, int]] = {"s": {"width": 32, "heads": 2}, "b": {"width": 48, "heads": 3}}


@dataclass(frozen=True)
class Row:
    """One teacher of the registry."""

    name: str
    family: str
    size: str
    title: str
    weights: str
    licence: str
    objective: str
    components: tuple[str, ...]
    patch: int
    tokens: int
    paper2026: bool
    """Whether the 2026 paper is known to name the family."""


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "teachers.toml").read_text())


@cache
def registry() -> dict[str, Row]:
    """All teachers by name."""
    rows = {}
    for family, facts in _table()["family"].items():
        for size, own in facts["teacher"].items():
            name = f"{family}_{size}"
            rows[name] = Row(
                name=name,
                family=family,
                size=size,
                title=facts["title"],
                weights=own["weights"],
                licence=facts["licence"],
                objective=facts["objective"],
                components=tuple(facts["components"]),
                patch=own["patch"],
                tokens=own["tokens"],
                paper2026=facts["paper2026"],
            )
    return rows


def miniatures() -> tuple[str, ...]:
    """Names of the teachers that have a miniature."""
    return tuple(_table()["miniature"])


def row(name: str) -> Row:
    """The registry's row of a name. Raises UserError for an unknown one."""
    if name not in registry():
        near = suggest(name, miniatures()) or suggest(name, registry())
        raise UserError(f"unknown teacher {name!r}{near}", "'atdiag teachers' lists them")
    return registry()[name]


def stand_in(name: str) -> str:
    """The miniature with a teacher's architecture: its own, or the nearest of another family or size."""
    found = row(name)
    twins = [registry()[m] for m in miniatures() if registry()[m].components == found.components]
    same_size = [twin for twin in twins if twin.size == found.size]
    return name if name in miniatures() else (same_size or twins)[-1].name


def miniature_network(name: str) -> Network:
    """The architecture of a teacher's miniature: its family's native components (or fewer) at small size.

    Raises UserError where the teacher has no miniature of its own, and says which to use.
    """
    found = row(name)
    own = _table()["miniature"].get(name)
    if own is None:
        use = stand_in(name)
        kind = "the plain architecture" if not found.components else "the architecture"
        raise UserError(f"{name} has no miniature of its own: at this size it would be {kind} of {use}", f"use {use!r}")
    return Network(
        image_size=20,
        patch_size=4,
        channels=1,
        depth=12,
        classes=10,
        mean=(0.18,),
        std=(0.33,),
        **_SIZES[found.size],
        **{"components": found.components, **own},
    )


def teacher(name: str, profile: str) -> Teacher:
    """The teacher of a name at a profile. Raises UserError if there is none, or if its weights are not here."""
    found = row(name)
    if profile != "mini":
        raise UserError(
            f"profile {profile!r} needs {name}'s published weights ({found.weights}), which this version can't load",
            f"use '--profile mini' for the miniature of {found.title}'s architecture",
        )
    miniature_network(name)
    try:
        return weights.shipped(name)
    except weights.WeightsMissingError as fault:
        raise UserError(str(fault)) from None
