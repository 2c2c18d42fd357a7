"""Rules that pair the blocks and heads of a teacher with those of a student of another size.

Pure integer arithmetic, so that a plan can be made without torch. What is done to the maps themselves:
:mod:`atdiag.transfer.sizes`. H and D are the teacher's numbers of heads and blocks, h and d the student's.
"""

from __future__ import annotations

from typing import Literal, get_args

BlockRule = Literal["uniform", "top", "bottom"]
"""Which block of a teacher gives to block i of the student (both counted from 0 at the input).

``uniform``: ceil((i + 1) D / d) - 1, the block that ends at the same relative depth, so that the last gives to the
last. ``top``: i + D - d, counted from the output. ``bottom``: i, counted from the input."""

HeadRule = Literal["first", "different", "mean", "repeat"]
"""Which heads of a teacher's block give to head i of the student's.

The teacher has more: ``first``, its head i. ``different``, one of the h heads that differ most from each other
(:func:`atdiag.transfer.sizes.most_different`). ``mean``, the mean of its heads i H / h to (i + 1) H / h - 1; h must
divide H. The teacher has fewer: ``repeat``, its head floor(i H / h)."""

BLOCK_RULES: tuple[BlockRule, ...] = get_args(BlockRule)
HEAD_RULES: tuple[HeadRule, ...] = get_args(HeadRule)


def paired_blocks(rule: BlockRule, layers: tuple[int, ...], student: int, teacher: int) -> tuple[int, ...]:
    """Return the teacher's block for each of some of the student's. student, teacher: their numbers of blocks.

    Raises ValueError for a block that the rule does not pair with any.

    >>> paired_blocks("uniform", (0, 1, 2), 3, 6), paired_blocks("uniform", (0, 1, 2, 3), 4, 2)
    ((1, 3, 5), (0, 0, 1, 1))
    >>> paired_blocks("top", (0, 1, 2), 3, 6), paired_blocks("bottom", (0, 1, 2), 3, 6)
    ((3, 4, 5), (0, 1, 2))
    """
    if rule == "uniform":
        return tuple(-(-(layer + 1) * teacher // student) - 1 for layer in layers)
    found = tuple(layer + (teacher - student if rule == "top" else 0) for layer in layers)
    if strange := [layer for layer, other in zip(layers, found, strict=True) if not 0 <= other < teacher]:
        raise ValueError(
            f"teacher_layers {rule} pairs no block of the teacher ({teacher} blocks) with block {strange[0]} of the "
            f"student ({student}): choose uniform, or layers={rule}:{teacher}"
        )
    return found


def default_heads(student: int, teacher: int) -> HeadRule | None:
    """Return the rule if none is asked for; None where both have as many heads."""
    return None if student == teacher else "first" if teacher > student else "repeat"


def check_heads(rule: HeadRule, student: int, teacher: int) -> None:
    """Raise ValueError for a rule that does not bring ``teacher`` heads to ``student`` ones."""
    told = f"the teacher has {teacher} heads, the student {student}"
    if (rule == "repeat") == (teacher > student):
        others = "first, different or mean" if teacher > student else "repeat"
        raise ValueError(f"teacher_heads {rule} does not apply: {told}; choose {others}")
    if rule == "mean" and teacher % student:
        raise ValueError(f"teacher_heads mean needs groups of equal size, and {told}: choose first or different")


def head_groups(rule: HeadRule, student: int, teacher: int) -> tuple[tuple[int, ...], ...]:
    """Return, for each of the student's heads, the teacher's whose maps it takes the mean of.

    For every rule but ``different``, which depends on the teacher's maps. Raises what :func:`check_heads` raises.

    >>> head_groups("mean", 2, 4), head_groups("repeat", 3, 2), head_groups("first", 2, 3)
    (((0, 1), (2, 3)), ((0,), (0,), (1,)), ((0,), (1,)))
    """
    check_heads(rule, student, teacher)
    if rule == "mean":
        size = teacher // student
        return tuple(tuple(range(head * size, (head + 1) * size)) for head in range(student))
    return tuple((head * teacher // student if rule == "repeat" else head,) for head in range(student))
