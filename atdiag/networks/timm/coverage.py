"""Count which of timm's networks can teach, and which can have a native student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from atdiag.core.errors import UserError
from atdiag.networks.timm import architectures

FAMILIES = ("vision_transformer", "deit", "eva", "beit")
"""timm's modules whose networks should have native students."""
OTHERS = ("vision_transformer_relpos", "naflexvit", "vision_transformer_hybrid", "vision_transformer_sam", "vitamin")
"""Further ones with attention over one token grid."""


class Covered(NamedTuple):
    """What atdiag can do with one of timm's networks."""

    module: str
    name: str
    kind: Literal["native", "maps", "refused"]
    """It can have a native student; its maps alone can be read; or it can't teach."""
    why: str
    """Its components, the differences that no student can be given, or the reason for the refusal."""


def look(module: str, name: str) -> Covered:
    """Return what can be done with a network, built without memory at its native size (rounded down to patches)."""
    source = architectures.timm_source(name)
    size = architectures.native_size(source)
    try:
        try:
            network = architectures.network(source, size)
        except UserError as fault:
            side = _patch(name) if "is not a multiple of that" in str(fault) else 0
            if not side:
                raise
            network = architectures.network(source, size // side * side)
    except UserError as fault:
        return Covered(module, name, "refused", str(fault).partition("can't be a teacher: ")[2] or str(fault))
    if network.differences:
        return Covered(module, name, "maps", ", ".join(network.differences))
    return Covered(module, name, "native", ", ".join(network.components) or "none")


def _patch(name: str) -> int:
    import timm
    import torch

    with torch.device("meta"):
        patch: Any = timm.create_model(name).patch_embed.patch_size
    return int(max(patch))


def survey(modules: Iterable[str] = (*FAMILIES, *OTHERS)) -> Iterator[Covered]:
    """Yield what can be done with each network of some of timm's modules."""
    import timm

    for module in modules:
        for name in timm.list_models(module=module):
            yield look(module, name)


def lines(found: Iterable[Covered]) -> list[str]:
    """Summarise a survey: numbers for each module, then who has no native student and why."""
    rows = list(found)
    out = []
    for module in dict.fromkeys(row.module for row in rows):
        own = Counter(row.kind for row in rows if row.module == module)
        out.append(
            f"{module}: {own.total()} networks, {own['native']} with native students, {own['maps']} show their maps, "
            f"{own['refused']} refused"
        )
    for kind, said in (("maps", "no native student"), ("refused", "can't teach")):
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.kind == kind:
                reasons.setdefault(row.why, []).append(row.name)
        out += [f"{said} ({why}): {', '.join(names)}" for why, names in reasons.items()]
    return out
