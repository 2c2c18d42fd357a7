"""Registry of the losses that compare attention maps: one entry holds everything about a loss.

An entry names its function, which is imported on first use, so that specs can be read without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any

from pydantic import AfterValidator


@dataclass(frozen=True)
class MapLoss:
    """A loss that compares a student's map with its teacher's.

    function: ``module:name`` of a function (teacher's map, student's map) -> scalar, the mean over rows.
    same_gradient_as: another loss with the same gradient; both are then one arm, hashed under that name. None: no
    other. of_logits: whether it compares logits, which an averaged map lacks.
    """

    name: str
    function: str
    same_gradient_as: str | None = None
    of_logits: bool = False

    @property
    def canonical(self) -> str:
        """Name under which the loss is hashed."""
        return self.same_gradient_as or self.name


MAP_LOSSES: dict[str, MapLoss] = {}
"""All losses by name; the first, that of Li et al. 2024, section 3.2, is the default."""

_DIVERGENCES = "atdiag.transfer.divergences"


def register_map_loss(loss: MapLoss) -> None:
    """Add a loss. Raises ValueError for a name that is taken."""
    if loss.name in MAP_LOSSES:
        raise ValueError(f"there is already a loss {loss.name!r}")
    MAP_LOSSES[loss.name] = loss


for _loss in (
    MapLoss("ce", f"{_DIVERGENCES}:cross_entropy"),
    MapLoss("kl", f"{_DIVERGENCES}:kl", same_gradient_as="ce"),
    MapLoss("mse", f"{_DIVERGENCES}:mse"),
    MapLoss("jsd", f"{_DIVERGENCES}:jsd"),
    MapLoss("l1", f"{_DIVERGENCES}:l1"),
    MapLoss("logits_mse", f"{_DIVERGENCES}:logits_mse", of_logits=True),
):
    register_map_loss(_loss)

DEFAULT = "ce"


def map_loss(name: str) -> MapLoss:
    """Look up a loss. Raises ValueError, listing the known names, for an unknown one."""
    if name not in MAP_LOSSES:
        raise ValueError(f"unknown loss {name!r} (known: {', '.join(MAP_LOSSES)})")
    return MAP_LOSSES[name]


def _known(name: str) -> str:
    return map_loss(name).name


LossName = Annotated[str, AfterValidator(_known)]
"""Field type: the name of a loss."""


def distinct() -> tuple[str, ...]:
    """Return the names of the losses that differ in their gradients, in order."""
    return tuple(name for name, loss in MAP_LOSSES.items() if loss.canonical == name)


@cache
def function(name: str) -> Callable[[Any, Any], Any]:
    """Import the function of a loss."""
    module, _, attribute = map_loss(name).function.partition(":")
    found: Callable[[Any, Any], Any] = getattr(import_module(module), attribute)
    return found
