"""Capture requests and observations: maps, values, residual streams and logits of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from atdiag.core.spec import Transfer
from atdiag.transfer.ops import QK, Averaged, Map


class AttentionRecord(NamedTuple):
    """The map that a block's attention used for a batch, and the values it was applied to.

    v: [B, H, N, d], or None if the block stopped before computing any.
    """

    map: Map
    v: Tensor | None = None

    @property
    def qk(self) -> QK:
        """The map by its queries and keys. Raises TypeError for a map that was given as a tensor."""
        if not isinstance(self.map, QK):
            raise TypeError("an averaged map has neither queries nor keys")
        return self.map


class UnreadableAttentionError(RuntimeError):
    """A call of scaled dot-product attention is not defined by q, k and one bias for all images."""


def record_of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionRecord:
    """Return the map and values of a call of scaled dot-product attention (SDPA), given that call's arguments.

    Grouped keys and values are repeated, one for each query head. Raises UnreadableAttentionError if the call's map is
    not that of q, k and one bias for all images.
    """
    if is_causal or dropout_p:
        raise UnreadableAttentionError("it attends with a causal mask or dropout")
    heads = query.shape[1]
    if key.shape[1] and (groups := heads // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    bias = None
    if attn_mask is not None:
        shape = attn_mask.shape[-3:]
        if not attn_mask.is_floating_point() or attn_mask.numel() != shape.numel():
            raise UnreadableAttentionError(
                f"a mask of {attn_mask.dtype}, {tuple(attn_mask.shape)}, is no bias of the heads' logits"
            )
        bias = attn_mask.reshape(shape).expand(heads, query.shape[2], key.shape[2])
    return AttentionRecord(QK(query, key, query.shape[-1] ** -0.5 if scale is None else scale, bias), value)


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture in a forward pass, by block; the network runs no further than needed for it."""

    maps: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()
    features: frozenset[int] = frozenset()
    """Blocks whose output, the residual stream, is requested."""
    logits: bool = False

    def __or__(self, other: CaptureRequest) -> CaptureRequest:
        """Return the union of two requests."""
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
        """Blocks of whose attention anything is requested."""
        return self.maps | self.values

    @property
    def whole_blocks(self) -> int:
        """Number of blocks that must run to their end if no logits are requested."""
        return max([0, *self.attention, *(layer + 1 for layer in self.features)])


def of_teacher(transfers: Iterable[Transfer]) -> CaptureRequest:
    """Return the request that these transfers make to a teacher at each step."""
    wanted = CaptureRequest()
    for transfer in transfers:
        if transfer.average != "examples":  # an average over examples is one map for all images, computed in advance
            wanted |= _wanted(transfer, transfer.sources)
    return wanted


def of_student(transfer: Transfer) -> CaptureRequest:
    """Return the request that a transfer loss makes to the student, besides its logits."""
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
    """The captured values, by block."""

    seen: Mapping[int, AttentionRecord] = field(default_factory=dict)
    features: Mapping[int, Tensor] = field(default_factory=dict)
    """Block -> its output [B, N, C]."""
    logits: Tensor | None = None
    """[B, classes]."""
    averages: Mapping[int, Averaged] = field(default_factory=dict)
    """Block -> a teacher's map averaged over examples: the same for every batch, so computed once in advance."""
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """A teacher's block -> its heads that were chosen to pass, where their choice differs from block to block."""

    def select(self, tokens: Tensor) -> Observation:
        """Restrict the observation to the tokens [M] that a network has; ``averages`` are restricted already."""
        return Observation(
            {
                i: AttentionRecord(one.qk.select(tokens), None if one.v is None else one.v[:, :, tokens])
                for i, one in self.seen.items()
            },
            {i: x[:, tokens] for i, x in self.features.items()},
            self.logits,
            self.averages,
            self.heads,
        )
