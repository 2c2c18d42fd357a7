"""What fits: a transfer by its arguments, a teacher and a student, and the student itself."""

from __future__ import annotations

from typing import Any, cast

from pydantic import ValidationError
from torch import nn

from atdiag.core.errors import UserError
from atdiag.core.selection import indices
from atdiag.core.spec import Network, Transfer, TransferMethod
from atdiag.core.spec.passing import check_transfer
from atdiag.study.settings import describe
from atdiag.study.transfer_settings import TransferSettings


def check(student: Network, teacher: Network, transfer: Transfer) -> None:
    """Raise UserError unless what a transfer takes from the teacher can be brought to the student."""
    for name, ours, theirs in (
        ("class token", student.class_token, teacher.class_token),
        ("channels", student.channels, teacher.channels),
    ):
        if ours != theirs:
            told = [f"{_prefix(one)}, {one.channels} channels" for one in (student, teacher)]
            raise UserError(
                f"the student has {told[0]}, the teacher {told[1]}", f"build one of them with the other's {name}"
            )
    if student.registers > teacher.registers:
        raise UserError(
            f"the student has {student.registers} registers or distillation tokens, the teacher {teacher.registers}",
            "a student may have fewer tokens than its teacher, and no more",
        )
    try:
        check_transfer(transfer, student, teacher)
    except ValueError as fault:
        raise UserError(str(fault)) from None


def _prefix(network: Network) -> str:
    return "a class token" if network.class_token else "no class token"


def transfer_of(
    network: Network,
    teacher: Network,
    *,
    layers: Any,
    teacher_layers: Any,
    teacher_heads: Any,
    heads: Any,
    weight: float | None,
    **fields: Any,
) -> Transfer:
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
    listed = (teacher_layers,) if isinstance(teacher_layers, str | int | None) else teacher_layers
    typed = ",".join(str(one) for one in listed if one is not None)
    rules: dict[str, Any] = {"teacher_heads": teacher_heads, "teacher_layers": typed or None}
    try:
        one = Transfer(method=method, layers=chosen, heads=some, weight=weight, **fields)
        return TransferSettings(**rules).between(one, network, teacher)
    except ValidationError as fault:
        raise UserError(describe(fault)) from None
    except UserError as fault:  # which names the settings of the command line
        raise UserError(str(fault).replace("transfer.", "")) from None


def check_student(student: nn.Module) -> None:
    """Raise UserError for parts under which a timm student's tokens or maps are not the teacher's."""
    drop = getattr(student, "patch_drop", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        raise UserError("the student drops patches in training (patch_drop_rate)", "build it with patch_drop_rate=0")
    drops = [getattr(module, "attn_drop", None) for module in student.modules()]
    if any(drop.p for drop in drops if isinstance(drop, nn.Dropout)):
        raise UserError("the student drops attention weights (attn_drop_rate)", "build it with attn_drop_rate=0")
