"""Locate a block's attention in the source of its forward, and convert the traced values to an attention record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atdiag.core.errors import UserError
from atdiag.core.spec import Network
from atdiag.transfer import ops
from atdiag.transfer.attention import Attention, AttentionOverride, Heads
from atdiag.transfer.observation import AttentionRecord, UnreadableAttentionError, record_of_sdpa
from atdiag.transfer.ops import QK, Averaged, Map


class TracingError(UserError):
    """A traced value is not what it should be; the message names the layer."""


Kind = Literal["ours", "fused", "explicit"]

_NODES: dict[Kind, str] = {
    "ours": r"^self_see_\d+$",
    "fused": r"scaled_dot_product_attention_\d+$",
    "explicit": r"^attn_softmax_\d+$",
}
"""Kind of attention -> pattern of nnsight's name for the node where its map can be read."""


@dataclass(frozen=True)
class Site:
    """Where a block's attention is read: a node in the source of its ``attn`` (``inside``), or of the block itself."""

    inside: bool
    node: str
    kind: Kind


def locate(module: nn.Module, names: Sequence[str]) -> tuple[Kind, list[str]]:
    """Return how a module attends, and the nodes in its source (nnsight's names) that match; normally exactly one."""
    kind: Kind = "ours" if isinstance(module, Attention) else "fused"
    if kind == "fused" and not getattr(module, "fused_attn", True):
        kind = "explicit"
    return kind, [name for name in names if re.search(_NODES[kind], name)]


def seen(site: Site, node: Any, network: Network, images: int, layer: int) -> AttentionRecord:
    """Return the map and the values at a site. Raises TracingError for attention that is not a map over all tokens."""
    arguments, output = node
    if site.kind == "ours":
        given = arguments[0][1] if len(arguments[0]) > 1 else arguments[1].get("given")
        seen = _ours(output[1], given)
        if isinstance(seen.map, Averaged):  # one map for all images, heads or queries: broadcast it
            whole = images, network.heads, network.tokens, network.tokens
            seen = AttentionRecord(Averaged(seen.map.p.expand(whole)), seen.v)
        return seen
    if site.kind == "explicit":
        seen = AttentionRecord(Averaged(output))
        shape = output.shape
    else:
        try:
            seen = record_of_sdpa(*arguments[0], **arguments[1])
        except UnreadableAttentionError as fault:
            raise TracingError(f"layer {layer}: {fault}") from None
        shape = (*seen.qk.q.shape[:3], seen.qk.k.shape[2])
    expected = (images, network.heads, network.tokens, network.tokens)
    if tuple(shape) != expected:
        raise TracingError(f"layer {layer}: its map is {tuple(shape)}, and one over all tokens is {expected}")
    return seen


def _ours(seen: AttentionRecord, given: AttentionOverride | None) -> AttentionRecord:
    """Return our module's record; if some heads were overridden, merge both groups of heads into one map."""
    if given is None or given.tensor != "map" or given.heads is None:
        return AttentionRecord(*seen)
    assert not isinstance(given.value, Tensor)
    return AttentionRecord(joined(given.value, seen.map, given.heads), seen.v)


def joined(part: Map, rest: Map, heads: Heads) -> Map:
    """Join the maps of two groups of heads; defined by q and k if both are, padding the narrower heads with zeros."""
    if isinstance(part, QK) and isinstance(rest, QK):
        both = (part, rest)
        width = max(map.q.shape[-1] for map in both)
        q = torch.cat([F.pad(map.q * map.scale, (0, width - map.q.shape[-1])) for map in both], 1)
        k = torch.cat([F.pad(map.k, (0, width - map.k.shape[-1])) for map in both], 1)
        bias = None
        if part.bias is not None or rest.bias is not None:
            none = [q.new_zeros(map.q.shape[1], q.shape[2], k.shape[2]) for map in both]
            bias = torch.cat([zero if map.bias is None else map.bias for map, zero in zip(both, none, strict=True)])
            bias = bias[heads.order]
        return QK(q[:, heads.order], k[:, heads.order], 1.0, bias)
    p, other = ops.probabilities(part), ops.probabilities(rest)
    shape = [max(a, b) for a, b in zip(p.shape, other.shape, strict=True)]
    sizes = (len(heads.part), len(heads.rest))
    whole = [x.expand(shape[0], size, *shape[2:]) for x, size in zip((p, other), sizes, strict=True)]
    return Averaged(torch.cat(whole, 1)[:, heads.order])


def attended(given: AttentionOverride, seen: AttentionRecord) -> Tensor:
    """Return the attention output [B, H, N, d] under an override."""
    qk, v = seen.qk, seen.v
    assert v is not None
    if given.tensor == "map":
        assert not isinstance(given.value, Tensor)
        if given.heads is None:
            return ops.attend(given.value, v)
        return ops.attend(joined(given.value, qk.select_heads(given.heads.rest), given.heads), v)
    assert isinstance(given.value, Tensor)
    tensors = {"q": qk.q, "k": qk.k, "v": v}
    taken, own = given.value.to(v.dtype), tensors[given.tensor]
    if given.heads is not None:
        taken = torch.cat([taken, own[:, given.heads.rest]], 1)[:, given.heads.order]
    tensors[given.tensor] = taken
    return ops.attend(QK(tensors["q"], tensors["k"], qk.scale, qk.bias), tensors["v"])
