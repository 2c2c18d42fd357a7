"""Maps of a teacher of one size for a student of another: heads chosen, averaged or repeated; another grid of patches.

A teacher's map P_t [B, H, N, N] becomes the student's P_s [B, h, n, n] in two steps, each left out where the two
networks agree:

heads: P_s[i] is the mean of P_t over a group of the teacher's heads (:mod:`atdiag.core.spec.sizes`); a group of one
    head is that head, which queries and keys still define.
grid: P_s = A P_t C. Both images are the same square, divided by the student into n patches S_i and by the teacher into
    N patches T_j. A[i, j] = |S_i and T_j| / |S_i|: a query takes the mean of the rows of the teacher's patches that it
    covers, by area. C[j, i] = |T_j and S_i| / |T_j|: what goes to a key is divided among the student's patches that
    cover it, by area. Class token and registers stay as they are. Rows of A and C sum to one, hence those of P_s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from atdiag.core.spec import Network, Transfer, sizes
from atdiag.transfer import ops
from atdiag.transfer.attention import indices
from atdiag.transfer.observation import AttentionRecord
from atdiag.transfer.ops import QK, Averaged, Map

Groups = tuple[tuple[int, ...], ...]
"""For each of the student's heads, the teacher's whose maps it takes the mean of."""


class Fitting(NamedTuple):
    """How a teacher's maps are brought to a student's size; None: as they are.

    heads: the groups of every block, or by the teacher's block. grid: A [n, N] and C [N, n].
    """

    heads: Groups | Mapping[int, Groups] | None = None
    grid: tuple[Tensor, Tensor] | None = None

    def record(self, block: int, seen: AttentionRecord) -> AttentionRecord:
        """Return the record of one of the teacher's blocks, at the student's size. Values stay as they are."""
        return AttentionRecord(self.map(block, seen.map), seen.v)

    def map(self, block: int, map: Map) -> Map:
        """Return the map of one of the teacher's blocks at the student's size."""
        if self.heads is not None:
            map = of_heads(map, self.heads[block] if isinstance(self.heads, Mapping) else self.heads)
        return map if self.grid is None else resampled(map, *self.grid)


def fitting(
    transfer: Transfer,
    student: Network,
    teacher: Network,
    device: torch.device,
    chosen: Mapping[int, tuple[int, ...]] | None = None,
) -> Fitting | None:
    """Return how a transfer's maps are brought to the student's size; None where they pass as they are.

    Only maps are changed, on the tokens that both networks have. chosen: the teacher's block -> its heads, for the rule
    ``different``. Raises ValueError without them.
    """
    if not transfer.takes_attention or transfer.tensor != "map":
        return None
    rule = transfer.teacher_heads
    heads: Groups | dict[int, Groups] | None = None
    if rule == "different":
        if not chosen:
            raise ValueError("the teacher's heads have not been chosen")
        heads = {block: tuple((head,) for head in some) for block, some in chosen.items()}
    elif rule is not None:
        heads = sizes.head_groups(rule, student.heads, teacher.heads)
    prefix = int(student.class_token) + student.registers
    grid = None if student.grid == teacher.grid else regridding(teacher.grid, student.grid, prefix, device)
    return None if heads is None and grid is None else Fitting(heads, grid)


# --- heads ---------------------------------------------------------------------------------------------------------


def of_heads(map: Map, groups: Groups) -> Map:
    """Return a map whose head i is the mean of the heads in group i; with one head in each, it has q and k still."""
    if all(len(group) == 1 for group in groups):
        return map.select_heads(indices(tuple(head for (head,) in groups), _device(map)))
    return _mean_of_heads(map, groups)


@torch.no_grad()
def _mean_of_heads(map: Map, groups: Groups) -> Averaged:
    if isinstance(map, Averaged):
        if map.p.shape[1] == 1:
            return map
        return Averaged(torch.stack([map.p[:, list(group)].mean(1) for group in groups], dim=1))
    map = map.widened()
    batch, _, tokens, _ = map.q.shape
    out = map.q.new_zeros(batch, len(groups), tokens, map.k.shape[-2])
    for images, heads, rows in ops.blocks(map.q):
        p = ops.probabilities(map.part((images, heads, rows)))
        for i, group in enumerate(groups):
            for k, head in enumerate(range(map.q.shape[1])[heads]):
                if head in group:
                    out[images, i, rows] += p[:, k] / len(group)
    return Averaged(out)


@torch.no_grad()
def head_divergence(map: QK) -> Tensor:
    """Return the Jensen-Shannon divergence in bits of every two heads [H, H], mean over images and queries."""
    map = map.widened()
    heads, tokens = map.q.shape[1:3]
    total = map.q.new_zeros(heads, heads, dtype=torch.float64 if map.q.device.type != "mps" else torch.float32)
    for image in range(len(map.q)):
        p = ops.probabilities(QK(map.q[image : image + 1], map.k[image : image + 1], map.scale, map.bias))[0]
        own = _entropy(p)
        for head in range(1, heads):
            apart = _entropy((p[:head] + p[head]) / 2) - (own[:head] + own[head]) / 2
            total[head, :head] += apart.sum(-1, dtype=total.dtype)
    return (total + total.T) / (len(map.q) * tokens)


def _entropy(p: Tensor) -> Tensor:
    """Return the entropy of rows in bits, [..., N] -> [...]."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log2()).sum(-1)


_DIGITS = 4
"""Decimals of a divergence that count, so that rounding errors of a device do not choose the heads."""


def most_different(divergence: Tensor, count: int) -> tuple[int, ...]:
    """Return ``count`` heads that differ most, in ascending order, by their divergences [H, H].

    The two that differ most, then again and again the head whose nearest chosen one is farthest (Gonzalez 1985,
    Clustering to minimize the maximum intercluster distance); of equal ones the first. A single one is the head with
    the largest mean divergence from the others.
    """
    table = [[round(value, _DIGITS) for value in row] for row in divergence.tolist()]
    heads = range(len(table))
    if count == 1:
        return (max(heads, key=lambda head: (round(sum(table[head]), _DIGITS), -head)),)
    first = max(((i, j) for i in heads for j in heads if i < j), key=lambda pair: table[pair[0]][pair[1]])
    chosen = list(first)
    while len(chosen) < count:
        rest = [head for head in heads if head not in chosen]
        chosen.append(max(rest, key=lambda head: min(table[head][other] for other in chosen)))
    return tuple(sorted(chosen))


# --- grid ----------------------------------------------------------------------------------------------------------


@cache
def regridding(teacher: int, student: int, prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return A [n, N] and C [N, n] of the module's formula. teacher, student: patches along a side.

    prefix: tokens before the patches, which both networks have.
    """
    along = torch.tensor(
        [
            [max(0, min((i + 1) * teacher, (j + 1) * student) - max(i * teacher, j * student)) for j in range(teacher)]
            for i in range(student)
        ],
        dtype=torch.float64,
    )  # the overlap of patches i and j along a side, in units of 1 / (teacher * student)
    rows, columns = along / teacher, along.T / student
    same = torch.eye(prefix, dtype=torch.float64)
    both = (torch.block_diag(same, torch.kron(one, one)) for one in (rows, columns))  # type: ignore[no-untyped-call]
    a, c = (one.to(device, torch.float32) for one in both)
    return a, c


@torch.no_grad()
def resampled(map: Map, rows: Tensor, columns: Tensor) -> Averaged:
    """Return ``rows P columns`` [B, H, n, n] of a map P [B, H, N, N], block by block."""
    map = map.widened()
    if isinstance(map, Averaged):
        p = map.p.expand(*map.p.shape[:2], rows.shape[1], -1)
        return Averaged(rows.to(p.dtype) @ p @ columns.to(p.dtype))
    rows, columns = rows.to(map.q.dtype), columns.to(map.q.dtype)
    with torch.autocast(map.q.device.type, enabled=False):
        out = map.q.new_zeros(*map.q.shape[:2], len(rows), len(rows))
        for images, heads, queries in ops.blocks(map.q):
            p = ops.probabilities(map.part((images, heads, queries)))
            out[images, heads] += rows[:, queries] @ (p @ columns)
    return Averaged(out)


# --- images --------------------------------------------------------------------------------------------------------


def seen_at(images: Tensor, size: int) -> Tensor:
    """Return images [B, C, S, S] in [0, 1] as a network of another image size sees them: resized once, antialiased.

    By cubic interpolation, clipped to [0, 1]; the images themselves where S is ``size``.
    """
    if images.shape[-1] == size:
        return images
    with torch.autocast(images.device.type, enabled=False):
        out = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return out.clamp_(0, 1)


def _device(map: Map) -> torch.device:
    return map.q.device if isinstance(map, QK) else map.p.device
