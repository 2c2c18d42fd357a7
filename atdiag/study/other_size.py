"""What a reader is told where a student's size is not its teacher's: sizes, blocks, heads, grid."""

from __future__ import annotations

from collections.abc import Iterable

from atdiag.core.selection import ranges
from atdiag.core.spec import Network, RunSpec, Teacher, Transfer
from atdiag.networks.registry import sizes


def option(student: Network, teacher: Network) -> str:
    """Return a student's size as it is typed, without what is the teacher's; empty for the teacher's size."""
    if not sizes.differing(student, teacher):
        return ""
    parts = [f"width={student.width}", f"depth={student.depth}", f"heads={student.heads}"]
    parts += [f"mlp={student.mlp_ratio:g}"] if student.mlp_ratio != teacher.mlp_ratio else []
    parts += [f"patch={student.patch_size}"] if student.patch_size != teacher.patch_size else []
    return ",".join(parts)


def notes(specs: Iterable[RunSpec]) -> list[str]:
    """Return how teachers' maps reach students of another size in some runs, each statement once; empty for equal ones.

    Every table shows them.
    """
    found: dict[str, None] = {}
    for spec in specs:
        if spec.teacher is None or not sizes.differing(spec.network, spec.teacher.network):
            continue
        found[_sizes(spec.network, spec.teacher)] = None
        for line in (_blocks(spec.transfer), _heads(spec), _grid(spec)):
            if line:
                found[line] = None
    return list(found)


def _sizes(student: Network, teacher: Teacher) -> str:
    return f"Another size: the student has {_size(student)}, {teacher.label} {_size(teacher.network)}."


def _size(network: Network) -> str:
    return f"width {network.width}, {network.depth} blocks, {network.heads} heads"


def _blocks(transfer: Transfer) -> str:
    if not transfer.teacher_layers:
        return ""
    theirs = ",".join(map(str, transfer.teacher_layers))
    return f"Blocks: the student's {ranges(transfer.layers)} take the teacher's {theirs}, in this order."


def _heads(spec: RunSpec) -> str:
    assert spec.teacher is not None
    own, theirs, rule = spec.network.heads, spec.teacher.network.heads, spec.transfer.teacher_heads
    said = {
        "first": f"the student's {own} take the teacher's first {own} of {theirs}",
        "different": (
            f"the student's {own} take those {own} of the teacher's {theirs} that differ most, block by block "
            "(Jensen-Shannon divergence on training images)"
        ),
        "mean": f"each of the student's {own} takes the mean of {theirs // own} of the teacher's {theirs}",
        "repeat": (
            f"the teacher's {theirs} are repeated for the student's {own} "
            f"({','.join(str(head * theirs // own) for head in range(own))})"
        ),
    }
    return f"Heads (teacher_heads={rule}): {said[rule]}." if rule else ""


def _grid(spec: RunSpec) -> str:
    assert spec.teacher is not None
    student, teacher = spec.network, spec.teacher.network
    grids = [f"{one.grid} x {one.grid}" for one in (student, teacher)]
    if student.grid != teacher.grid and spec.transfer.takes_attention:
        return (
            f"Grid: the teacher's maps on {grids[1]} patches are RESAMPLED to the student's {grids[0]} by area "
            "(A P C, rows sum to one): part of every contrast here may be due to that."
        )
    if student.image_size != teacher.image_size:
        return (
            f"Grid: both have {grids[0]} patches; the student sees each crop at {student.image_size} px, the teacher "
            f"the same crop resized to {teacher.image_size} px."
        )
    return ""
