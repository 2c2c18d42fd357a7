"""Locate a block's attention in the source of its forward, and read and write it there."""

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


Kind = Literal["ours", "given", "fused"]

_NODES: dict[Kind, str] = {"ours": r"^self_see_\d+$", "fused": r"scaled_dot_product_attention_\d+$"}
"""Kind of attention -> pattern of nnsight's name for the node in its forward where its map can be read."""

_INSIDE: dict[Kind, str] = {"ours": "ops_attend_0", "given": "self__under_0"}
"""Kind of our attention -> the node within that node where q, k and v meet: its own map, or one that it is given."""


@dataclass(frozen=True)
class Site:
    """Where a block's attention is read: a node in the source of its ``attn`` (``inside``), or of the block itself."""

    inside: bool
    node: str
    kind: Kind


def locate(block: nn.Module, envoy: Any) -> tuple[Site | None, str]:
    """Return where a block attends, by nnsight's names of the nodes in its source; or None, and why not."""
    attn = getattr(block, "attn", None)
    inside = isinstance(attn, nn.Module)
    module: nn.Module = attn if isinstance(attn, nn.Module) else block
    kind: Kind = "ours" if isinstance(module, Attention) else "fused"
    names: Sequence[str] = (envoy.attn if inside else envoy).source.names
    found = [name for name in names if re.search(_NODES[kind], name)]
    if len(found) == 1:
        return Site(inside, found[0], kind), ""
    how = "no softmax attention that can be read" if not found else f"attention in {len(found)} places"
    return None, f"({type(module).__name__}) has {how}"


def unfused(block: Any) -> nn.Module | None:
    """Return the module of a block whose attention is by the explicit formula, if it is."""
    for module in (getattr(block, "attn", None), block):
        if isinstance(module, nn.Module) and not getattr(module, "fused_attn", True):
            return module
    return None


def node(site: Site, block: Any) -> Any:
    """Return nnsight's node of a site, of the envoy of its block; for our attention, only during a pass."""
    found = getattr((block.attn if site.inside else block).source, site.node)
    return found if site.kind == "fused" else getattr(found.source, _INSIDE[site.kind])


def read(site: Site, node: Any, network: Network, images: int, layer: int) -> AttentionRecord:
    """Return the map and the values at a site. Raises TracingError for attention that is not a map over all tokens."""
    if site.kind == "given":
        (_, given, v), _ = node.inputs
        return AttentionRecord(_whole(given, node), v)
    args, kwargs = node.inputs
    if site.kind == "ours":
        return AttentionRecord(*args)
    try:
        seen = record_of_sdpa(*args, **kwargs)
    except UnreadableAttentionError as fault:
        raise TracingError(f"layer {layer}: {fault}") from None
    shape = (*seen.qk.q.shape[:3], seen.qk.k.shape[2])
    expected = (images, network.heads, network.tokens, network.tokens)
    if tuple(shape) != expected:
        raise TracingError(f"layer {layer}: its map is {tuple(shape)}, and one over all tokens is {expected}")
    return seen


def _whole(given: AttentionOverride, node: Any) -> Map:
    """Return the map in use under a given one: merged with the module's own where only some heads are given."""
    assert not isinstance(given.value, Tensor)
    return given.value if given.heads is None else joined(given.value, node.output[0], given.heads)


def output(site: Site, node: Any) -> Tensor:
    """Return the attention's output [B, H, N, d] at a site."""
    out: Tensor = node.output[1] if site.kind == "given" else node.output
    return out


def write_output(site: Site, node: Any, out: Tensor) -> None:
    """Have the block go on with another attention output [B, H, N, d]."""
    node.output = (node.output[0], out) if site.kind == "given" else out


def write_operands(site: Site, node: Any, record: AttentionRecord) -> Tensor | None:
    """Have the operation use other q, k, v; where that is not possible, return the output that they give."""
    assert record.v is not None
    if site.kind == "given":
        return ops.attend(record.map, record.v)
    if site.kind == "ours":
        node.inputs = ((record.map, record.v), {})
    else:
        args, kwargs = node.inputs
        names = ("query", "key", "value")
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        node.inputs = ((record.qk.q, record.qk.k, record.v, *args[3:]), kwargs)
    return None


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
