"""What passes, as a user says it: ``transfer.layers=top:6``, ``transfer.heads=0,3``, ``transfer.tensor=q``."""

from __future__ import annotations

from typing import Literal

from atdiag.core.selection import indices
from atdiag.core.spec import NonNegative, Spec, Transfer, TransferMethod
from atdiag.core.spec.losses import LossName


class TransferSettings(Spec):
    """The settings under ``transfer.``: the form that every transfer of an experiment has unless the experiment itself
    varies it. Fields as in :class:`atdiag.core.spec.Transfer`."""

    weight: NonNegative | None = None
    """Factor of the transfer loss; None: 3.0 of maps, as in the 2024 paper's code, and 1.0 of logits and features."""
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
        """The transfer of a method in this form.

        layers: the blocks, where the experiment itself chooses them. Fields that a method does not have are left out:
        whether a user's setting changes anything is for the command to check. Raises UserError for blocks or heads that
        are not there.
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
