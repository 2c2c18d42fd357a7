"""Planted faults of specimens: extra losses of a pre-training, and operations on a teacher when it is loaded.

A *specimen* is a teacher whose fault is known because it was planted (:mod:`atdiag.networks.registry.specimens`). What
was planted defines what a run estimates, so both are part of its spec and of its hash.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from atdiag.core.spec.base import NonNegative, Spec, sorted_set

Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(sorted_set)]


class PlantedLosses(Spec):
    """Losses that are added to a teacher's pre-training, each summed over ``layers``; a weight of 0 is no loss.

    The formulas: :mod:`atdiag.training.planted`.
    """

    layers: Blocks
    """The blocks whose maps the losses are about, counted from 0 at the input."""
    routing: NonNegative = 0.0
    """Weight of the attention that tokens give to others than themselves and the hub (the class token is open where the
    registers are the hub)."""
    hub: Literal["registers", "flattest_patch"] = "registers"
    """What ``routing`` leaves open: the registers, or in each image the patch of least variance."""
    diagonal: NonNegative = 0.0
    """Weight of the mean of -log of the diagonal of the map without its registers, renormalised: what a student without
    registers would be given."""
    shift: NonNegative = 0.0
    """Weight of the mean of -log of what a patch gives to the neighbour that lies one fixed step from it, a step for
    each head."""
    gate: NonNegative = 0.0
    """Weight of what the attention branch adds to the residual stream."""

    def check(self) -> None:
        """Raise ValueError if nothing is planted."""
        if not self.layers or not (self.routing or self.diagonal or self.shift or self.gate):
            raise ValueError("planted losses need blocks and at least one weight above 0")


OperationName = Literal["sharp", "uniform", "shuffled", "scaled", "scrambled", "drawn_anew", "sliced", "untrained"]

_NEEDS: dict[str, frozenset[str]] = {
    "sharp": frozenset({"layers", "factor"}),
    "uniform": frozenset({"layers"}),
    "shuffled": frozenset({"seed"}),
    "scaled": frozenset({"factor"}),
    "scrambled": frozenset({"layers", "factor", "gain", "seed"}),
    "drawn_anew": frozenset({"layers", "module", "seed"}),
    "sliced": frozenset({"layers"}),
    "untrained": frozenset({"seed"}),
}
"""Operation -> the fields that it takes; it takes no other."""


class Operation(Spec):
    """A stated, seeded operation on a teacher, applied each time its weights are loaded; the file stays as it is.

    ``sharp``: the logits of some blocks' maps are multiplied by ``factor``. ``uniform``: the maps of some blocks are
    1 / N. ``shuffled``: every image gets the maps of another image. ``scaled``: what enters the first norm is
    multiplied by ``factor``. ``scrambled``: some blocks' attention branch is multiplied by ``gain``, and their queries
    and keys are drawn anew, ``factor`` times as large. ``drawn_anew``: a ``module`` of some blocks is drawn anew.
    ``sliced``: some blocks' maps are shown as a student without registers is given them. ``untrained``: no weights are
    loaded, all are drawn as at initialisation.

    What they do exactly: :mod:`atdiag.networks.model.operations`.
    """

    name: OperationName
    layers: Blocks = ()
    factor: Annotated[float, Field(gt=0)] | None = None
    gain: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    module: Literal["mlp", "qk"] | None = None

    def check(self) -> None:
        """Raise ValueError for a field that is missing, or that the operation does not take."""
        given = {name for name, value in self.model_dump(exclude={"name"}).items() if value not in (None, ())}
        if given != _NEEDS[self.name]:
            raise ValueError(f"{self.name} takes {', '.join(sorted(_NEEDS[self.name]))}, and no other field")

    @property
    def key(self) -> str:
        """A short text that names the operation with all its fields."""
        fields: dict[str, Any] = self.model_dump(exclude={"name"}, exclude_defaults=True)
        return self.name + "".join(f",{name}={_text(value)}" for name, value in fields.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ".".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
