"""What can pass from a teacher to a student of some sizes."""

from __future__ import annotations

from atdiag.core.spec import losses, sizes
from atdiag.core.spec.network import Network
from atdiag.core.spec.transfer import Transfer


def check_transfer(transfer: Transfer, student: Network, teacher: Network) -> None:
    """Raise ValueError if what a transfer takes from a teacher can't be brought to the student."""
    for layers, network, whose in (
        (transfer.layers, student, ""),
        (transfer.sources, teacher, "teacher's "),
    ):
        if layers and max(layers) >= network.depth:
            raise ValueError(f"layer {max(layers)} is out of range: the {whose}network has {network.depth} blocks")
    if transfer.shared_drop_path:
        _check_branches(student, teacher)
    if transfer.heads is not None and transfer.heads[-1] >= student.heads:
        raise ValueError(f"head {transfer.heads[-1]} is out of range: the student has {student.heads} heads")
    if (transfer.different_heads or 0) > student.heads:
        raise ValueError(f"different_heads {transfer.different_heads}: the student has {student.heads} heads")
    what = "features" if transfer.method == "features" else transfer.tensor
    if transfer.takes_attention and what == "map":
        _check_maps(transfer, student, teacher)
    elif what != "map":
        for field in ("width", "grid", *(("heads",) if what != "features" else ())):
            ours, theirs = getattr(student, field), getattr(teacher, field)
            if ours != theirs:
                raise ValueError(
                    f"{what} can pass only between networks of the same {field}: teacher {theirs}, student {ours}"
                )
    if transfer.method == "logits" and student.classes != teacher.classes:
        raise ValueError(
            f"logit distillation needs a teacher with the student's classes "
            f"(teacher {teacher.classes}, student {student.classes})"
        )


def _check_branches(student: Network, teacher: Network) -> None:
    """Raise ValueError if the teacher has not the student's residual branches, or they can't be dropped."""
    if student.depth != teacher.depth:
        raise ValueError(
            f"shared_drop_path: the teacher has {teacher.depth} blocks, the student {student.depth}, so they have "
            "different branches to drop: leave it out"
        )
    if teacher.differences:
        raise ValueError(
            f"shared_drop_path: no branch can be dropped in a teacher with {', '.join(teacher.differences)}: "
            "leave it out"
        )


def _check_maps(transfer: Transfer, student: Network, teacher: Network) -> None:
    """Raise ValueError if maps can't be brought to the student's heads and grid."""
    rule = transfer.teacher_heads
    if student.heads != teacher.heads:
        if rule is None:
            raise ValueError(
                f"the teacher has {teacher.heads} heads, the student {student.heads}: give teacher_heads, one of "
                f"{', '.join(sizes.HEAD_RULES)}"
            )
        sizes.check_heads(rule, student.heads, teacher.heads)
    if transfer.loss is None or not losses.map_loss(transfer.loss).of_logits:
        return
    if rule == "mean" or student.grid != teacher.grid:
        made = "averaged over heads" if rule == "mean" else "resampled over the grid"
        raise ValueError(f"a map that is {made} has no logits, which {transfer.loss} compares: choose ce")
