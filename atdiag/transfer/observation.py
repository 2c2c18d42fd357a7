"""What a network hands out while it runs: maps, values, residual stream, logits; and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from atdiag.core.spec import Transfer
from atdiag.transfer.ops import QK, Averaged, Map


class AttentionRecord(NamedTuple):
    """What a block's attention used for a batch: the map, and the values that it was applied to.

    v: [B, H, N, d], or None where the block was stopped before it computed any.
    """

    map: Map
    v: Tensor | None = None

    @property
    def qk(self) -> QK:
        """The map by its queries and keys. Raises TypeError for a map that was given as a tensor."""
        if not isinstance(self.map, QK):
            raise TypeError("an averaged map has neither queries nor keys")
        return self.map


@dataclass(frozen=True)
class CaptureRequest:
    """What is asked of a forward pass, by block: a network runs no further than the last of it."""

    maps: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    features: frozenset[int] = frozenset()
    """Blocks whose output, the residual stream, is wanted."""
    logits: bool = False

    def __or__(self, other: CaptureRequest) -> CaptureRequest:
        """What serves both."""
        return CaptureRequest(
            self.maps | other.maps,
            self.values | other.values,
            self.features | other.features,
            self.logits or other.logits,
        )

    def __bool__(self) -> bool:
        return bool(self.maps or self.values or self.features or self.logits)

    @property
    def attention(self) -> frozenset[int]:
        """Blocks of whose attention anything is wanted."""
        return self.maps | self.values

    @property
    def whole_blocks(self) -> int:
        """How many blocks must run to their end, if no logits are wanted."""
        return max([0, *self.attention, *(layer + 1 for layer in self.features)])


def of_teacher(transfers: Iterable[Transfer]) -> CaptureRequest:
    """What these transfers need of a teacher at each step."""
    wanted = CaptureRequest()
    for transfer in transfers:
        if transfer.average != "examples":  # which is one map for all images, made beforehand
            wanted |= _wanted(transfer, transfer.sources)
    return wanted


def of_student(transfer: Transfer) -> CaptureRequest:
    """What a transfer loss needs of the student, beside its logits."""
    return _wanted(transfer, transfer.layers) if transfer.method != "copy" else CaptureRequest()


def _wanted(transfer: Transfer, layers: tuple[int, ...]) -> CaptureRequest:
    blocks = frozenset(layers)
    if transfer.method == "logits":
        return CaptureRequest(logits=True)
    if transfer.method == "features":
        return CaptureRequest(features=blocks)
    return CaptureRequest(values=blocks) if transfer.tensor == "v" else CaptureRequest(maps=blocks)


@dataclass(frozen=True)
class Observation:
    """What was handed out, by block."""

    seen: Mapping[int, AttentionRecord] = field(default_factory=dict)
    features: Mapping[int, Tensor] = field(default_factory=dict)
    """Block -> its output [B, N, C]."""
    logits: Tensor | None = None
    """[B, classes]."""
    averages: Mapping[int, Averaged] = field(default_factory=dict)
    """Block -> a teacher's map averaged over examples: the same for every batch, so made once and not by a pass."""

    def select(self, tokens: Tensor) -> Observation:
        """As seen by a network that has only some of the tokens (indices [M]); ``averages`` are of those already."""
        return Observation(
            {
                i: AttentionRecord(one.qk.select(tokens), None if one.v is None else one.v[:, :, tokens])
                for i, one in self.seen.items()
            },
            {i: x[:, tokens] for i, x in self.features.items()},
            self.logits,
            self.averages,
        )
