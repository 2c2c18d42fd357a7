"""Specimens: teachers with a planted, known fault, on which the instrument is calibrated (``specimens.toml``).

A specimen is a miniature: pre-trained with a fault (its weights ship with the package), or derived from another one
when it is loaded, by a stated and seeded operation. It is never evidence about a published family, so it is in no
list of teachers but its own, and no claim of a paper is judged by it. Imports nothing heavy.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network, Operation, PlantedLosses, Teacher
from atdiag.networks.registry import miniature
from atdiag.networks.weights import sources

PROFILE = "specimen"
"""In place of a specimen's profile: its label is ``hub (specimen)``."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a specimen is pre-trained."""

    network: Network
    train: int
    """Number of scenes."""
    epochs: int
    seed: int
    """Of data and model; outside the seeds of any study."""
    losses: PlantedLosses | None
    """What plants the fault; None: too short a pre-training is the fault."""


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A teacher with a known fault."""

    name: str
    planted: str
    """The fault, in a few words."""
    summary: str
    decoys: tuple[str, ...] = ()
    """Native components that have nothing to do with the fault."""
    kind: str
    """The specimen of which it is another pre-training, with another seed; its own name if it is the first."""
    pretraining: Pretraining | None = None
    """How its weights were made; None: they are those of ``of``."""
    of: str = ""
    """The miniature or specimen whose weights it takes; empty: its own."""
    operation: Operation | None = None
    """What is done to the weights when they are loaded."""

    @property
    def file(self) -> Path:
        """The weight file that it is loaded from."""
        return sources.shipped_path(self.of or self.name)

    @property
    def made(self) -> str:
        """How it is made: ``pre-trained``, or ``dinov2_s, sharp``."""
        weights = self.of or "pre-trained"
        return weights if self.operation is None else f"{weights}, {self.operation.name}"


@cache
def specimens() -> dict[str, Specimen]:
    """Return all specimens by name."""
    content = tomllib.loads(Path(__file__).with_name("specimens.toml").read_text())
    return {one.name: one for kind, row in content.items() for one in _of_kind(kind, row)}


def members(kind: str) -> tuple[Specimen, ...]:
    """Return the specimens of a kind, one for each seed of its pre-training; none for an unknown kind."""
    return tuple(one for one in specimens().values() if one.kind == kind)


def _of_kind(kind: str, row: Mapping[str, Any]) -> Iterator[Specimen]:
    """Yield a specimen, and its further pre-trainings: ``hub``, ``hub_2``, ``hub_3``."""
    first = _read(kind, row)
    yield first
    for number, seed in enumerate(row.get("further_seeds", ()), start=2):
        assert first.pretraining is not None  # the table gives no seeds to what is not pre-trained
        how = replace(first.pretraining, seed=seed)
        yield replace(first, name=f"{kind}_{number}", pretraining=how)


def _read(name: str, row: Mapping[str, Any]) -> Specimen:
    read_below = ("pretrain", "operation", "decoys", "further_seeds")
    own = {key: value for key, value in row.items() if key not in read_below}
    pretraining = operation = None
    if (how := row.get("pretrain")) is not None:
        network = miniature.network(**how["network"])
        losses = how.get("losses")
        planted = None if losses is None else PlantedLosses(**_blocks(losses, network.depth))
        pretraining = Pretraining(**{**how, "network": network, "losses": planted})
    if (what := row.get("operation")) is not None:
        operation = Operation(**_blocks(what, miniature.DEPTH))
    decoys = tuple(row.get("decoys", ()))
    return Specimen(name=name, kind=name, pretraining=pretraining, operation=operation, decoys=decoys, **own)


def _blocks(fields: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {**fields, "layers": tuple(range(depth))} if fields.get("layers") == "all" else dict(fields)


def specimen(name: str) -> Specimen:
    """Return a specimen by name. Raises UserError for an unknown one."""
    if name not in specimens():
        near = suggest(name, specimens())
        raise UserError(f"unknown specimen {name!r}{near}", "'atdiag teachers --specimens' lists them")
    return specimens()[name]


def teacher(name: str, profile: str, image_size: int | None = None) -> Teacher:
    """Return the spec of a specimen.

    image_size: of the images that it will see, None for scenes. Raises UserError for another profile than mini, for
    real images, and for one that was not pre-trained yet.
    """
    found = specimen(name)
    if profile != "mini":
        raise UserError(
            f"{name} is a specimen, a miniature with a planted fault: there is none at {profile}", "use `profile` mini"
        )
    path = found.file
    if not path.exists():
        whose = found.of or name
        raise UserError(
            f"the weights of {whose} are not in {path.parent}", f"'atdiag pretrain {whose} --install' makes them"
        )
    network = Network(**sources.metadata(path)["network"])
    if image_size not in (None, network.image_size):
        raise UserError(
            f"{name} is a specimen for scenes of {network.image_size} px, not for images of {image_size} px",
            "leave `data.name` out",
        )
    return Teacher(
        name=name,
        profile=PROFILE,
        network=network,
        sha256=sources.shipped_sha256(path),
        operation=found.operation,
    )


def is_specimen(found: Teacher) -> bool:
    """Return whether a teacher is a specimen."""
    return found.profile == PROFILE and found.name in specimens()


def shipped_file(found: Teacher) -> Path:
    """Return the weight file of a teacher that ships; a derived specimen's is that of the miniature it is made from."""
    return specimens()[found.name].file if is_specimen(found) else sources.shipped_path(found.name)
