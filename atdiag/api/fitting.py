"""What fits: a transfer by its arguments, a teacher and a student, and the student itself."""

from __future__ import annotations

from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from atdiag.core.errors import UserError
from atdiag.core.selection import indices
from atdiag.core.spec import Network, Transfer, TransferMethod
from atdiag.study.settings import describe


def check(student: Network, teacher: Network, transfer: Transfer) -> None:
    """Raise UserError unless a transfer's maps of the teacher fit the student."""
    facts = [(network.grid, network.class_token) for network in (student, teacher)]
    if facts[0] != facts[1]:
        raise UserError(
            f"the token grids differ: the student has {_grid(student)}, the teacher {_grid(teacher)}",
            "build one of them for another image size (img_size), or choose another teacher",
        )
    if student.image_size != teacher.image_size or student.channels != teacher.channels:
        sizes = [f"{one.channels} x {one.image_size} x {one.image_size}" for one in (student, teacher)]
        raise UserError(
            f"the student sees images of {sizes[0]}, the teacher of {sizes[1]}", "both see the same: build one anew"
        )
    if student.registers > teacher.registers:
        raise UserError(
            f"the student has {student.registers} registers or distillation tokens, the teacher {teacher.registers}",
            "a student may have fewer tokens than its teacher, and no more",
        )
    if student.heads != teacher.heads:
        raise UserError(
            f"the student has {student.heads} heads, the teacher {teacher.heads}", "build one with as many as the other"
        )
    if student.depth != teacher.depth and not transfer.teacher_layers:
        raise UserError(
            f"the student has {student.depth} blocks, the teacher {teacher.depth}",
            "give layers=(...) and teacher_layers=(...), the teacher's block for each of them",
        )
    if max(transfer.sources, default=0) >= teacher.depth:
        raise UserError(f"the teacher has {teacher.depth} blocks, and no block {max(transfer.sources)}")
    if transfer.tensor != "map" and student.width != teacher.width:
        raise UserError(
            f"{transfer.tensor} passes only between equal widths: the student has {student.width}, the teacher "
            f"{teacher.width}",
            "leave tensor out: maps pass between any widths",
        )


def _grid(network: Network) -> str:
    token = "a class token" if network.class_token else "no class token"
    side = network.grid
    return f"{side} x {side} patches ({network.image_size} px in steps of {network.patch_size}) and {token}"


def transfer_of(network: Network, *, layers: Any, heads: Any, weight: float | None, **fields: Any) -> Transfer:
    """Return the transfer that the arguments describe. Raises UserError for contradictory ones."""
    chosen = indices(layers if isinstance(layers, str | int | None) else tuple(layers), network.depth, "layers")
    some = None if heads is None else indices(heads if isinstance(heads, str) else tuple(heads), network.heads, "heads")
    method = cast(TransferMethod, fields.pop("method"))
    if method == "copy" and (weight is not None or fields["loss"] is not None):
        raise UserError("copy has no loss, so no weight either", "leave them out, or give method='distill'")
    if method == "distill" and weight == 0:
        raise UserError("a weight of 0 transfers nothing", "give a positive one")
    if fields["average"] == "examples":
        raise UserError("average='examples' needs the training images ahead of the training", "atdiag.run can do it")
    try:
        return Transfer(method=method, layers=chosen, heads=some, weight=weight, **fields)
    except ValidationError as fault:
        raise UserError(describe(fault)) from None


def check_student(student: nn.Module) -> None:
    """Raise UserError for parts under which a timm student's tokens or maps are not the teacher's."""
    drop = getattr(student, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise UserError("the student drops patches in training (patch_drop_rate)", "build it with patch_drop_rate=0")
    drops = [getattr(module, "attn_drop", None) for module in student.modules()]
    if any(drop.p for drop in drops if isinstance(drop, nn.Dropout)):
        raise UserError("the student drops attention weights (attn_drop_rate)", "build it with attn_drop_rate=0")
