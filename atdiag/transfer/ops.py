"""Attention maps without N x N tensors: their representation, averages, and application to values.

Shapes: B images, H heads, N tokens, d head width, all of *one* block. A map is represented not by an array [B, H, N, N]
but by what defines it, :class:`QK`, so that each function may choose how to compute it. Only an average of maps, which
no q and k define, is a tensor: :class:`Averaged`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atdiag.transfer import sdpa

EXPLICIT_UP_TO_TOKENS = 64
"""Sequence length up to which :func:`attend` is as fast on a CPU by the explicit formula as by SDPA, forward alone or
with gradients of q, k and v (one core: equal at 65 tokens, explicit 1.3 times slower at 197, 1.7 at 577)."""
EXPLICIT_IN_PART_UP_TO_TOKENS = 400
"""The same limit where SDPA's backward pass is wasteful or missing: it can't skip q and k if only the values have a
gradient (copy: 1.7 times slower than the explicit formula at 197 tokens, equal at 577), and it has none for a bias (1.2
times slower at 197, equal from 400)."""

_BLOCK_CPU = 2**18
"""Elements of a map formed at a time in blockwise computation, for a CPU: what fits in the cache of each thread's
core."""
_BLOCK = 2**24
"""The same for other devices: enough to keep them busy (64 MiB in float32)."""
_ALL = slice(None)
Block: TypeAlias = tuple[slice, slice, slice]
"""Slices of a map: images, heads, queries."""


class QK(NamedTuple):
    """The tensors that define an attention map: ``softmax(scale * q k^T + bias)`` over keys.

    q, k: [B, H, N, d]; bias: [H, N, N] (a relative position bias) or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None

    def select(self, tokens: Tensor) -> QK:
        """Return the map on a subset of tokens (indices [M]), as if the others had never existed.

        Slicing q, k and bias *before* softmax gives exactly the renormalised map: a teacher with registers as seen by a
        student without.
        """
        bias = None if self.bias is None else self.bias[:, tokens][:, :, tokens]
        return QK(self.q[:, :, tokens], self.k[:, :, tokens], self.scale, bias)

    def select_heads(self, heads: Tensor) -> QK:
        """Return the maps of some heads (indices [h])."""
        return QK(self.q[:, heads], self.k[:, heads], self.scale, None if self.bias is None else self.bias[heads])

    def part(self, block: Block) -> QK:
        """Return a block of the map over all keys: q [b, h, r, d], k [b, h, N, d], bias [h, r, N]."""
        return QK(self.q[block], self.k[block[:2]], self.scale, None if self.bias is None else self.bias[block[1:]])

    def widened(self) -> QK:
        """Return the same map in float32 or better, detached, with the scale folded into q.

        Softmax depends on differences between logits: a large offset common to all keys would leave no precision for
        them in bf16.
        """
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k = self.q.detach().to(wide) * self.scale, self.k.detach().to(wide)
        bias = None if self.bias is None else self.bias.detach().to(wide)
        return QK(q.contiguous(), k.contiguous(), 1.0, bias)


class Averaged(NamedTuple):
    """A map stored as a tensor p [B or 1, H or 1, N or 1, N], rows sum to one; size 1 means shared along that axis."""

    p: Tensor

    def select_heads(self, heads: Tensor) -> Averaged:
        """Return the maps of some heads (indices [h]); a single map for all heads is returned as it is."""
        return self if self.p.shape[1] == 1 else Averaged(self.p[:, heads])

    def part(self, block: Block) -> Averaged:
        """Return a block of the map: p [b or 1, h or 1, r or 1, N]."""
        chosen = tuple(_ALL if n == 1 else part for n, part in zip(self.p.shape[:3], block, strict=True))
        return Averaged(self.p[chosen])

    def widened(self) -> Averaged:
        """Return the same map in float32 or better, detached."""
        return Averaged(self.p.detach().to(torch.promote_types(self.p.dtype, torch.float32)))


Map: TypeAlias = QK | Averaged
Over = Literal["queries", "heads", "layers", "examples"]


def prefers_explicit(device: torch.device, tokens: int, in_part: bool = False) -> bool:
    """Return whether :func:`attend` is faster by the explicit formula, for a device and a number of tokens.

    in_part: gradients are needed only for the values, or also for a bias.
    """
    return device.type == "cpu" and tokens <= (EXPLICIT_IN_PART_UP_TO_TOKENS if in_part else EXPLICIT_UP_TO_TOKENS)


def logits(qk: QK, rows: slice = _ALL) -> Tensor:
    """Return the map's logits [B, H, N, N] before softmax, or those of some queries, in float32 or better.

    Even for bf16 tensors and under autocast (reason: :meth:`QK.widened`).
    """
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (qk.q[:, :, rows], qk.k))
    with torch.autocast(q.device.type, enabled=False):
        scores = (q if qk.scale == 1.0 else q * qk.scale) @ k.transpose(-2, -1)
    return scores if qk.bias is None else scores + qk.bias[:, rows]


def probabilities(map: Map, rows: slice = _ALL) -> Tensor:
    """Return the map as a tensor [B, H, N, N] (an averaged one in its own shape), or its rows for some queries."""
    if isinstance(map, Averaged):
        return map.part((_ALL, _ALL, rows)).p
    return logits(map, rows).softmax(-1)


def log_probabilities(map: Map) -> Tensor:
    """Return the logarithm of :func:`probabilities`; zeros of an averaged map count as the smallest positive number."""
    if isinstance(map, Averaged):
        return map.p.clamp_min(torch.finfo(map.p.dtype).tiny).log()
    return logits(map).log_softmax(-1)


def blocks(like: Tensor) -> Iterator[Block]:
    """Yield the blocks of a map for queries ``like`` [B, H, N, d]: images, heads of one, or queries of one head.

    Long blocks of one head, rather than a few queries of each, keep matrix products efficient.
    """
    batch, heads, tokens = like.shape[:3]
    # torch.compile can't trace the number of threads.
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    size = _BLOCK_CPU * threads if like.device.type == "cpu" else _BLOCK
    steps = size // (heads * tokens * tokens), size // (tokens * tokens), size // tokens
    for image in _parts(batch, steps[0]):
        for head in _parts(heads, steps[1]):
            for rows in _parts(tokens, steps[2]):
                yield image, head, rows


def _parts(length: int, step: int) -> list[slice]:
    step = max(step, 1)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


@torch.no_grad()
def average(maps: Sequence[Map], over: Over) -> list[Averaged]:
    """Return the maps of several layers, each averaged for transfer (Li et al. 2024, the averaging ablation).

    ``queries``: one row for all tokens [B, H, 1, N]; ``heads`` [B, 1, N, N]; ``examples``: over the batch [1, H, N, N];
    ``layers``: over ``maps`` [B, H, N, N], the same for each of them. Maps are formed block by block, and nothing is
    stored that an average does not need. No gradient flows.
    """
    if over == "layers":
        mean = _mean(maps[0], over)
        for map in maps[1:]:
            mean += _mean(map, over)
        return [Averaged(mean / len(maps))] * len(maps)
    return [Averaged(_mean(map, over)) for map in maps]


def _mean(map: Map, over: Over) -> Tensor:
    map = map.widened()
    dim = {"examples": 0, "heads": 1, "queries": 2}.get(over)
    if isinstance(map, Averaged):
        return map.p.clone() if dim is None else map.p.mean(dim, keepdim=True)
    shape = [*map.q.shape[:3], map.k.shape[-2]]
    if dim is not None:
        shape[dim] = 1
    out = map.q.new_zeros(shape)
    for block in blocks(map.q):
        p = probabilities(map.part(block))
        if dim is None:
            out[block] = p
        else:
            into = tuple(_ALL if i == dim else part for i, part in enumerate(block))
            out[into] += p.sum(dim, keepdim=True)
    return out if dim is None else out / map.q.shape[dim]


def attend(map: Map, v: Tensor, explicit: bool | None = None) -> Tensor:
    """Apply a map to values [B, H, N, e]: ``softmax(logits) v``, or ``p v`` for an averaged one.

    Two implementations with equal values and gradients (to q, k, v and bias): *explicit* builds [B, H, N, N]; *fused*
    is SDPA, which does not. ``explicit=None`` chooses by :func:`prefers_explicit`.
    """
    if isinstance(map, Averaged):
        # einsum folds p's broadcast axes into the columns of v; matmul would copy p for every image.
        out = torch.einsum("bhqk,bhke->bhqe", map.p.to(v.dtype), v)
        return out.expand(*out.shape[:2], v.shape[2], -1)
    bias_trained = torch.is_grad_enabled() and map.bias is not None and map.bias.requires_grad
    if explicit is None:
        copied = torch.is_grad_enabled() and v.requires_grad and not (map.q.requires_grad or map.k.requires_grad)
        explicit = prefers_explicit(v.device, v.shape[-2], in_part=bias_trained or copied)
    if explicit:
        return logits(map).softmax(-1).to(v.dtype) @ v
    out = sdpa.attention(map.q, map.k, v, map.scale, map.bias)
    if bias_trained:
        out = _BiasGradient.apply(out, map.q.detach(), map.k.detach(), v.detach(), map.bias, map.scale)
    return out


class _BiasGradient(torch.autograd.Function):
    """Identity on SDPA's output that computes the gradient of the bias block by block.

    SDPA itself computes a mask's gradient only by the formula that stores N x N tensors. With o = P v, the gradient to
    the logits is ``P * (do v^T - rowsum(do * o))``, to the bias its sum over images.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(out, q, k, v, bias)
        ctx.scale = scale
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, q, k, v, bias = ctx.saved_tensors
        map = QK(q, k, ctx.scale, bias).widened()
        wide = map.q.dtype
        common = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        total = torch.zeros_like(bias, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks(q):
                pulled = grad[block].to(wide) @ v[block[:2]].to(wide).transpose(-2, -1)
                pulled -= common[block]
                total[block[1:]] += pulled.mul_(probabilities(map.part(block))).sum(0)
        return grad, None, None, None, total.to(bias.dtype), None
