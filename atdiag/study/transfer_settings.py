"""Transfer settings as typed by a user: ``transfer.layers=top:6``, ``transfer.heads=0,3``, ``transfer.tensor=q``."""

from __future__ import annotations

from typing import Literal

from atdiag.core.selection import indices
from atdiag.core.spec import NonNegative, Spec, Transfer, TransferMethod
from atdiag.core.spec.losses import LossName


class TransferSettings(Spec):
    """The settings under ``transfer.``, used by every transfer of an experiment unless the experiment varies them.

    Fields as in :class:`atdiag.core.spec.Transfer`.
    """

    weight: NonNegative | None = None
    """Factor of the transfer loss; None: 3.0 for maps, as in the 2024 paper's code, and 1.0 for logits and features."""
    loss: LossName | None = None
    reduce: Literal["sum", "mean"] = "sum"
    tensor: Literal["map", "q", "k", "v"] = "map"
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    layers: str | int | tuple[int, ...] | None = None
    heads: str | int | tuple[int, ...] | None = None
    temperature: float | None = None

    def transfer(
        self, method: TransferMethod, depth: int, heads: int, layers: tuple[int, ...] | None = None
    ) -> Transfer:
        """Return the transfer of a method with these settings.

        layers: blocks, if the experiment chooses them. Fields that do not apply to a method are ignored: the command
        checks whether each of the user's settings has an effect. Raises UserError for blocks or heads that do not
        exist.
        """
        if layers is None:
            layers = indices(self.layers, depth, "transfer.layers")
        chosen = None if self.heads is None else indices(self.heads, heads, "transfer.heads")
        if method == "none":
            return Transfer()
        if method == "logits":
            return Transfer(method=method, weight=self.weight, temperature=self.temperature)
        if method == "features":
            return Transfer(method=method, layers=layers, weight=self.weight, reduce=self.reduce)
        attention = {"layers": layers, "heads": chosen, "tensor": self.tensor, "average": self.average}
        if method == "copy":
            return Transfer(method=method, **attention)
        return Transfer(method=method, **attention, weight=self.weight, loss=self.loss, reduce=self.reduce)
