"""How a student starts, and what passes from its teacher during training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from atdiag.core.spec import losses
from atdiag.core.spec.base import NonNegative, Spec, sorted_set

BlockModule = Literal["attn", "mlp"]


class Init(Spec):
    """How a student starts: from scratch, or from its teacher's weights with some modules re-initialised."""

    source: Literal["scratch", "teacher"] = "scratch"
    reinit: Annotated[tuple[BlockModule, ...], AfterValidator(sorted_set)] = ()
    """Modules of every block that are drawn afresh although the rest starts from the teacher."""
    head: bool = False
    """Also take the teacher's classifier head (a student starts with a fresh head otherwise)."""
    head_rows: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """With ``head``: which of the teacher's classes the student's classes are, in order (a data set of ten ImageNet
    classes). Empty: the same classes."""
    layer_scale: Literal["fold", "drop"] = "fold"
    """What becomes of a teacher's LayerScale in a student without it: multiplied into the projection that follows
    (exact), or dropped."""

    def canonical(self) -> dict[str, Any]:
        """Drop what does not apply: all of it from scratch, the rows of a head that is not taken."""
        if self.source == "scratch":
            return {"reinit": (), "head": False, "head_rows": (), "layer_scale": "fold"}
        return {} if self.head else {"head_rows": ()}


TransferMethod = Literal["copy", "distill", "logits", "features", "none"]

_METHODS_TEXT = {
    "copy": "the teacher's tensor replaces the student's",
    "logits": "the student's class probabilities are pulled to the teacher's",
    "features": "the student's residual stream is pulled to the teacher's",
}


class Transfer(Spec):
    """What passes from the teacher to the student during training.

    ``copy``: the teacher's map replaces the student's (Li et al. 2024, section 3.1). ``distill``: a loss pulls the
    student's map to the teacher's (section 3.2). ``none``: nothing. Beside them, as comparisons that pass no attention:
    ``logits``, distillation of the class probabilities (Hinton et al. 2015), and ``features``, of the residual stream.
    """

    method: TransferMethod = "none"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The student's blocks, counted from 0 at the input."""
    teacher_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The teacher's block for each of ``layers``; empty: the same ones."""
    tensor: Literal["map", "q", "k", "v"] = "map"
    """What of a block's attention passes: the map, or its queries, keys or values alone."""
    heads: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(sorted_set)] | None = None
    """Which heads; None: all."""
    average: Literal["examples", "queries", "heads", "layers"] | None = None
    """What the teacher's map is averaged over before it passes (of layers and heads: the chosen ones): what is lost
    shows what mattered."""
    loss: losses.LossName | None = None
    """How two maps are compared (distill): a name in :data:`~atdiag.core.spec.losses.MAP_LOSSES`. ``kl`` becomes
    ``ce``: their gradients are the same, so they are one arm. Of q, k, v and features it is always ``mse``."""
    reduce: Literal["sum", "mean"] = "sum"
    """How the losses of several layers become one."""
    weight: NonNegative | None = None
    """Factor of the transfer loss. Copy has none."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """By which both networks' logits are divided (``logits``)."""

    def canonical(self) -> dict[str, Any]:
        """Fill in what a method implies, order the pairs of blocks, and call no transfer "none"."""
        if self._lacks_layers():
            return {}  # refused by the check
        nothing = self.method == "none" or self.weight == 0 or self.heads == ()
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
        # The mean of one is itself.
        alone = {"layers": own, "heads": self.heads or ()}.get(self.average or "", ())
        if len(alone) == 1 and self.tensor == "map" and self.method != "features":
            changed["average"] = None
        return changed

    def check(self) -> None:
        """Raise ValueError for a field that the method does not have, and for blocks that can't be paired."""
        if self._lacks_layers():
            raise ValueError(f"{self.method} needs layers: give the student's blocks, () for none")
        if self.method == "none":
            return
        if self.method == "logits":
            self._refuse("layers", "teacher_layers", "heads", "average", "loss")
            if self.tensor != "map" or self.reduce != "sum":
                raise ValueError("logits are a single output per image: leave out tensor and reduce")
            return
        self._refuse("temperature")
        self._check_layers()
        if self.method == "features":
            self._refuse("heads", "average")
            if self.tensor != "map" or self.loss != "mse":
                raise ValueError("features are the residual stream, compared by mse: leave out tensor and loss")
        elif self.method == "copy":
            self._refuse("loss", "weight")
        else:
            self._check_loss()
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
        """The student's blocks in order, and the teacher's for each (empty for the same ones)."""
        theirs = self.teacher_layers or self.layers
        if len(theirs) != len(self.layers):
            return self.layers, self.teacher_layers  # refused by the check
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
    def takes_attention(self) -> bool:
        """Whether anything of the teacher's attention passes."""
        return self.method in ("copy", "distill")
