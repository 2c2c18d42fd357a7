"""Sizes of networks by name, for students: those of registered teachers, of timm's models, and standard ones.

Imports nothing heavy at mini; elsewhere timm for a look-up.
"""

from __future__ import annotations

from collections.abc import Mapping

from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.networks.registry import miniature, specimens, stored, teachers
from atdiag.networks.registry.published import table
from atdiag.networks.weights import sources


def letters(profile: str) -> Mapping[str, Mapping[str, int]]:
    """Return the standard sizes of a profile: width, depth and heads by letter."""
    if profile == "mini":
        return {name: {"depth": miniature.DEPTH, **size} for name, size in miniature.SIZES.items()}
    sizes: Mapping[str, Mapping[str, int]] = table()["size"]
    return sizes


def letter(network: Network, profile: str) -> str | None:
    """Return the letter of a network's size at a profile; None if it has none."""
    own = {"width": network.width, "depth": network.depth, "heads": network.heads}
    return next((name for name, size in letters(profile).items() if size == own), None)


def names(profile: str) -> tuple[str, ...]:
    """Return the names that a student's size can have, for suggestions."""
    known = teachers.miniatures() if profile == "mini" else tuple(teachers.registry())
    return (*letters(profile), *known)


def network(reference: str, profile: str) -> Network:
    """Return the architecture of a reference at its own image size: its miniature's at mini.

    Raises UserError if it names nothing.
    """
    if reference in specimens.specimens():
        raise UserError(f"{reference} is a specimen: a student has the size of a network", "type s or b")
    reference = teachers.canonical(reference)
    name = reference.partition("@")[0]
    if name.startswith(stored.OURS):
        path = sources.split_reference(reference)[1]
        own = None if path is None else stored.network(path)
        if own is None:
            raise UserError(f"{path}: there is no such file, or no architecture in its header")
        return own
    if profile == "mini" and teachers.is_published(name):
        return teachers.miniature_network(name)
    try:
        source = teachers.source(reference)
    except sources.WeightsMissingError as fault:
        raise UserError(str(fault)) from None
    from atdiag.networks.timm import architectures

    row = teachers.registry().get(name)
    size = row.image_size if row is not None and row.image_size else architectures.native_size(source)
    return architectures.network(source, size)


def differing(student: Network, teacher: Network) -> list[tuple[str, float, float]]:
    """Return the sizes in which a student differs from its teacher: name, the student's, the teacher's."""
    fields = ("width", "depth", "heads", "mlp_ratio", "patch_size", "image_size")
    found = [(name, getattr(student, name), getattr(teacher, name)) for name in fields]
    return [(name, ours, theirs) for name, ours, theirs in found if ours != theirs]
