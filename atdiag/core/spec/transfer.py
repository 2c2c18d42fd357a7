"""Initialisation of a student, and what its teacher transfers during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from atdiag.core.spec import losses
from atdiag.core.spec.base import NonNegative, Spec, sorted_set
from atdiag.core.spec.sizes import HeadRule

BlockModule = Literal["attn", "mlp"]


class Init(Spec):
    """Initialisation of a student: from scratch, or from its teacher's weights with some modules re-initialised."""

    source: Literal["scratch", "teacher"] = "scratch"
    reinit: Annotated[tuple[BlockModule, ...], AfterValidator(sorted_set)] = ()
    """Modules re-initialised in every block although the rest starts from the teacher."""
    head: bool = False
    """Whether to copy the teacher's classifier head, too (otherwise it is random)."""
    head_rows: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """With ``head``: the teacher's class for each of the student's, in order (for a data set of ten ImageNet classes).
    Empty: the same classes."""
    probe: bool = False
    """Whether the head is a linear probe, fitted to the frozen rest on training images: a teacher itself whose own head
    is for other classes or missing."""
    layer_scale: Literal["fold", "drop"] = "fold"
    """Treatment of a teacher's LayerScale in a student without it: fold it into the projection that follows (exact), or
    drop it."""

    def canonical(self) -> dict[str, Any]:
        """Drop fields that do not apply: all of them from scratch, head rows if the head is not copied."""
        if self.source == "scratch":
            return {"reinit": (), "head": False, "head_rows": (), "probe": False, "layer_scale": "fold"}
        return {} if self.head else {"head_rows": ()}


TransferMethod = Literal["copy", "distill", "logits", "features", "none"]

_METHODS_TEXT = {
    "copy": "the teacher's tensor replaces the student's",
    "logits": "the student's class probabilities are pulled to the teacher's",
    "features": "the student's residual stream is pulled to the teacher's",
}


class Transfer(Spec):
    """What the teacher transfers to the student during training.

    ``copy``: the teacher's map replaces the student's (Li et al. 2024, section 3.1). ``distill``: a loss pulls the
    student's map to the teacher's (section 3.2). ``none``: nothing. For comparison, without attention: ``logits``
    distils the class probabilities (Hinton et al. 2015), ``features`` the residual stream.
    """

    method: TransferMethod = "none"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The student's blocks, counted from 0 at the input."""
    teacher_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The teacher's block for each of ``layers``; empty: the same blocks."""
    tensor: Literal["map", "q", "k", "v"] = "map"
    """Which tensor of a block's attention is transferred: the map, or its queries, keys or values alone."""
    heads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(sorted_set)] | None = None
    """The student's heads; None: all."""
    different_heads: Annotated[int, Field(ge=0)] | None = None
    """How many heads, chosen in each block by the teacher's maps: those that differ most from each other
    (:func:`atdiag.transfer.sizes.most_different`). Each passes to the student's head of the same number. None: those of
    ``heads``."""
    teacher_heads: HeadRule | None = None
    """How the teacher's heads are brought to the student's number; None if both have as many."""
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    """Dimension over which the teacher's map is averaged before transfer (layers and heads: the selected ones); what is
    lost shows what mattered."""
    loss: losses.LossName | None = None
    """The loss between maps (distill): a name in :data:`~atdiag.core.spec.losses.MAP_LOSSES`. ``kl`` becomes ``ce``:
    their gradients are equal, so they are one arm. For q, k, v and features it is always ``mse``."""
    reduce: Literal["sum", "mean"] = "sum"
    """How the losses of several layers are combined."""
    weight: NonNegative | None = None
    """Factor of the transfer loss; None for copy."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Temperature that divides both networks' logits (``logits``)."""
    shared_drop_path: bool = False
    """Whether the teacher drops the residual branches that drop path drops in its student, in training (Li et al.'s
    code does). False: the teacher is whole."""

    def canonical(self) -> dict[str, Any]:
        """Fill in what a method implies, sort the pairs of blocks, and reduce an empty transfer to "none"."""
        if self._lacks_layers():
            return {}  # rejected by check
        nothing = self.method == "none" or self.weight == 0 or self.heads == () or self.different_heads == 0
        if nothing or (self.method != "logits" and not self.layers):
            return {name: info.default for name, info in type(self).model_fields.items()}
        if self.method == "logits":
            return {"weight": self._weight_or(1.0), "temperature": self.temperature or 3.0}
        own, theirs = self._paired()
        changed: dict[str, Any] = {"layers": own, "teacher_layers": theirs}
        if self.method == "features":
            changed |= {"loss": self.loss or "mse", "weight": self._weight_or(1.0)}
        elif self.method == "distill":
            changed |= {"loss": self._canonical_loss(), "weight": self._weight_or(3.0)}
        if self.method == "copy" or (self.reduce == "mean" and len(own) == 1):
            changed["reduce"] = "sum"
        # An average over a single element changes nothing.
        alone = {"layers": own, "heads": self.heads or ()}.get(self.average or "", ())
        if len(alone) == 1 and self.tensor == "map" and self.method != "features":
            changed["average"] = None
        return changed

    def check(self) -> None:
        """Raise ValueError for a field that does not apply to the method, and for blocks that can't be paired."""
        if self._lacks_layers():
            raise ValueError(f"{self.method} needs layers: give the student's blocks, () for none")
        if self.method == "none":
            return
        if self.method == "logits":
            self._refuse("layers", "teacher_layers", "heads", "different_heads", "teacher_heads", "average", "loss")
            if self.tensor != "map" or self.reduce != "sum":
                raise ValueError("logits are a single output per image: leave out tensor and reduce")
            return
        self._refuse("temperature")
        self._check_layers()
        if self.tensor != "map" and self.teacher_heads is not None:
            raise ValueError(f"{self.tensor} passes only between equal numbers of heads: leave out teacher_heads")
        if self.method == "features":
            self._refuse("heads", "different_heads", "average", "teacher_heads")
            if self.tensor != "map" or self.loss != "mse":
                raise ValueError("features are the residual stream, compared by mse: leave out tensor and loss")
        elif self.method == "copy":
            self._refuse("loss", "weight")
        else:
            self._check_loss()
        if self.different_heads is not None and (self.heads, self.teacher_heads, self.average) != (None, None, None):
            raise ValueError("different_heads are chosen by whole maps: leave out heads, teacher_heads and average")
        if self.average is not None and self.tensor != "map":
            raise ValueError(f"only maps are averaged before transfer, not {self.tensor}")

    def _lacks_layers(self) -> bool:
        return self.method not in ("none", "logits") and "layers" not in self.model_fields_set

    def _weight_or(self, default: float) -> float:
        return default if self.weight is None else self.weight

    def _canonical_loss(self) -> str:
        if self.tensor != "map":
            return self.loss or "mse"
        return losses.map_loss(self.loss or losses.DEFAULT).canonical

    def _paired(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the student's blocks in order, and the teacher's for each (empty if the same)."""
        theirs = self.teacher_layers or self.layers
        if len(theirs) != len(self.layers):
            return self.layers, self.teacher_layers  # rejected by check
        pairs = sorted(set(zip(self.layers, theirs, strict=True)))
        own, other = tuple(layer for layer, _ in pairs), tuple(layer for _, layer in pairs)
        return own, () if other == own else other

    def _refuse(self, *fields: str) -> None:
        for name in fields:
            if getattr(self, name) != type(self).model_fields[name].default:
                why = _METHODS_TEXT.get(self.method, "it compares maps, not class probabilities")
                raise ValueError(f"{self.method} has no {name} ({why})")

    def _check_layers(self) -> None:
        if self.teacher_layers and len(self.teacher_layers) != len(self.layers):
            raise ValueError(
                f"teacher_layers names {len(self.teacher_layers)} blocks for the {len(self.layers)} of layers: "
                "give one for each"
            )
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(
                "layers names a block twice: each block of the student takes from one block of the teacher"
            )

    def _check_loss(self) -> None:
        assert self.loss is not None
        if self.tensor != "map":
            if self.loss != "mse":
                raise ValueError(f"{self.tensor} is compared by mse: {self.loss} compares maps")
        elif losses.map_loss(self.loss).of_logits and self.average is not None:
            others = [name for name in losses.distinct() if not losses.map_loss(name).of_logits]
            raise ValueError(f"an averaged map has no logits: choose {', '.join(others[:-1])} or {others[-1]}")

    @property
    def sources(self) -> tuple[int, ...]:
        """The teacher's block for each of ``layers``."""
        return self.teacher_layers or self.layers

    @property
    def takes_all_heads(self) -> bool:
        """Whether every head of the student takes part."""
        return self.heads is None and self.different_heads is None

    @property
    def takes_attention(self) -> bool:
        """Whether any part of the teacher's attention is transferred."""
        return self.method in ("copy", "distill")
