"""Transfer settings as typed by a user: ``transfer.layers=top:6``, ``transfer.heads=0,3``, ``transfer.tensor=q``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from atdiag.core.errors import UserError, suggest
from atdiag.core.selection import indices
from atdiag.core.spec import HeadRule, Network, NonNegative, Spec, Transfer, TransferMethod, sizes
from atdiag.core.spec.losses import LossName


def _head_rule(value: Any) -> Any:
    """Raise ValueError, with "did you mean", for a rule that there is not."""
    if isinstance(value, str) and value not in sizes.HEAD_RULES:
        raise ValueError(f"unknown rule{suggest(value, sizes.HEAD_RULES)} (known: {', '.join(sizes.HEAD_RULES)})")
    return value


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
    different_heads: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    shared_drop_path: bool = False
    teacher_layers: str | int | tuple[int, ...] | None = None
    """Of a student with another number of blocks: a rule of :data:`atdiag.core.spec.sizes.BlockRule`, or the teacher's
    block for each of ``layers``; None: ``uniform``."""
    teacher_heads: Annotated[HeadRule | None, BeforeValidator(_head_rule)] = None
    """Of a student with another number of heads; None: ``first`` where the teacher has more, else ``repeat``."""
    pool: Literal["teacher", "mean"] = "teacher"
    """How the students are read: as the plain ViT with the teacher's tokens, or by the mean of their patch tokens, as
    MAE's fine-tuning and the 2024 paper's students are. No effect where that is the plain way, and on native students
    with a pooling of their own."""
    grid: Literal["resize", "resample"] = "resize"
    """Of a student with another patch size, on real images: show them to the teacher at the size that gives it the
    student's grid, or at the student's size, and resample its maps. Embedded images always resample."""

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
        branches = {"shared_drop_path": self.shared_drop_path}
        if method == "logits":
            return Transfer(method=method, weight=self.weight, temperature=self.temperature, **branches)
        if method == "features":
            return Transfer(method=method, layers=layers, weight=self.weight, reduce=self.reduce, **branches)
        which: dict[str, Any] = {"layers": layers, "heads": chosen, "different_heads": self.different_heads, **branches}
        attention = {**which, "tensor": self.tensor, "average": self.average}
        if method == "copy":
            return Transfer(method=method, **attention)
        return Transfer(method=method, **attention, weight=self.weight, loss=self.loss, reduce=self.reduce)

    def between(self, transfer: Transfer, student: Network, teacher: Network) -> Transfer:
        """Return a transfer with the teacher's blocks and heads for a student of another size.

        The same transfer where both have as many, and for blocks that it names itself. Raises UserError for blocks
        that can't be paired, and ValueError for heads that can't.
        """
        changed: dict[str, Any] = {}
        if transfer.layers and not transfer.teacher_layers:
            changed["teacher_layers"] = self._blocks(transfer.layers, student.depth, teacher.depth)
        if transfer.takes_attention and transfer.tensor == "map" and student.heads != teacher.heads:
            changed["teacher_heads"] = self.teacher_heads or sizes.default_heads(student.heads, teacher.heads)
        return Transfer.model_validate({**transfer.model_dump(), **changed}) if changed else transfer

    def _blocks(self, layers: tuple[int, ...], student: int, teacher: int) -> tuple[int, ...]:
        asked = self.teacher_layers
        if asked is None or asked in sizes.BLOCK_RULES:
            try:
                return sizes.paired_blocks(asked or "uniform", layers, student, teacher)
            except ValueError as fault:
                raise UserError(f"transfer.{fault}") from None
        parts = asked if isinstance(asked, tuple) else tuple(part.strip() for part in str(asked).split(","))
        named = f"`transfer.teacher_layers`={','.join(map(str, parts))}"
        if strange := [part for part in parts if not str(part).isdecimal()]:
            raise UserError(
                f"{named}: {strange[0]!r} is neither a block nor a rule{suggest(str(strange[0]), sizes.BLOCK_RULES)}",
                f"give {', '.join(sizes.BLOCK_RULES)}, or a block of the teacher for each of the student's, as [1,3,5]",
            )
        blocks = tuple(map(int, parts))
        if len(blocks) != len(layers):
            raise UserError(
                f"{named} names {len(blocks)} blocks, and {len(layers)} of the student's take one each",
                "give one for each, in order",
            )
        if max(blocks) >= teacher:
            raise UserError(f"{named}: {max(blocks)} is out of range", f"the teacher has blocks 0 to {teacher - 1}")
        return blocks
