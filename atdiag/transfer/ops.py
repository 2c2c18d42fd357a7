"""Exact attention transfer: the student's output under a teacher's map, and divergences between maps.

Shapes: B images, H heads, N tokens, d head width, all of *one* block. A map is never an argument: it is named by what
defines it, :class:`QK`, so that each function may choose how to compute it.

Every function has two paths with the same value: *explicit* builds [B, H, N, N] tensors; *fused* has scaled dot-product
attention (SDPA) as its primitive and stores none. :func:`prefers_explicit` is the rule that chooses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EXPLICIT_UP_TO_TOKENS = 400
"""On a CPU the explicit formula is the faster one for sequences up to about this length (measured: 2.4 times at 197
tokens, equal at about 577); beyond, and on every other device, the fused path is."""

_ROWS = 128  # queries per block where logits must be formed block by block
_ALL = slice(None)


class QK(NamedTuple):
    """What defines an attention map: ``softmax(scale * q k^T + bias)`` over keys.

    q, k: [B, H, N, d]; bias: [H, N, N] (a relative position bias) or None.
    """

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None

    def select(self, tokens: Tensor) -> QK:
        """The map on a subset of tokens (indices [M]), as if the others had never been there.

        Slicing q, k and bias *before* softmax is exactly the renormalised map: a teacher with registers seen by a
        student without.
        """
        bias = None if self.bias is None else self.bias[:, tokens][:, :, tokens]
        return QK(self.q[:, :, tokens], self.k[:, :, tokens], self.scale, bias)


def prefers_explicit(device: torch.device, tokens: int) -> bool:
    """Whether the explicit formula is the faster path for a device and a number of tokens."""
    return device.type == "cpu" and tokens <= EXPLICIT_UP_TO_TOKENS


def logits(qk: QK, rows: slice = _ALL) -> Tensor:
    """The map's logits [B, H, N, N] before softmax, or of some queries only; in float32 or better.

    Also of bf16 tensors and under autocast: what softmax keeps of a logit is its difference from the others, and a
    large part common to all keys would leave none of that in a number rounded to bf16.
    """
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (qk.q[:, :, rows], qk.k))
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * qk.scale) @ k.transpose(-2, -1)
    return scores if qk.bias is None else scores + qk.bias[:, rows]


def attend(qk: QK, v: Tensor, explicit: bool | None = None) -> Tensor:
    """Apply a map to values [B, H, N, e]: ``softmax(logits) v``. ``explicit=None`` chooses by the rule."""
    if explicit is None:
        explicit = prefers_explicit(v.device, v.shape[-2])
    if explicit:
        return logits(qk).softmax(-1).to(v.dtype) @ v
    # SDPA falls back in silence to a formula with N x N tensors where head widths differ (zeros that pad q and k change
    # no product, those that pad v are cut off again) and, on a CPU, for a mask of three dimensions.
    width = max(qk.q.shape[-1], v.shape[-1])
    q, k, padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (qk.q, qk.k, v))
    bias = None if qk.bias is None else qk.bias.to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, padded, attn_mask=bias, scale=qk.scale)[..., : v.shape[-1]]


def cross_entropy(teacher: QK, student: QK, explicit: bool | None = None) -> Tensor:
    """``-sum_k p_t log p_s``, summed over keys, mean over batch, heads and queries (Li et al. 2024, section 3.2).

    A scalar with gradients to the student's q, k and bias; none reach the teacher.

    Fused path, with s = scale * q_s k_s^T + bias_s: the loss is ``lse(s) - scale * q_s . (P_t k_s) - E_t[bias_s]`` and
    its gradient to the logits ``p_s - p_t``, so that ``grad q_s = scale * (P_s k_s - P_t k_s)`` and ``grad k_s`` is the
    difference of what the two attentions P_s, P_t give back to their value argument for upstream ``scale * q_s``.
    """
    if explicit is None:
        explicit = prefers_explicit(student.q.device, student.q.shape[-2])
    if explicit:
        with torch.no_grad():
            target = logits(teacher).softmax(-1)
        return -(target * logits(student).log_softmax(-1)).sum(-1).mean()
    value: Tensor = _CrossEntropy.apply(
        student.q, student.k, student.bias, teacher.q, teacher.k, teacher.bias, student.scale, teacher.scale
    )
    return value


def entropy(qk: QK) -> Tensor:
    """Mean entropy of a map's rows in nats: the least value that cross-entropy to it can take. A scalar."""
    log_p = logits(qk).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


class _CrossEntropy(torch.autograd.Function):
    """The fused path of :func:`cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_s: Tensor,
        k_s: Tensor,
        bias_s: Tensor | None,
        q_t: Tensor,
        k_t: Tensor,
        bias_t: Tensor | None,
        scale_s: float,
        scale_t: float,
    ) -> Tensor:
        ctx.save_for_backward(q_s, k_s, bias_s, q_t, k_t, bias_t)
        ctx.scales = scale_s, scale_t
        k_c = _centred(k_s)
        student, teacher = QK(q_s, k_c, scale_s, bias_s), QK(q_t, k_t, scale_t, bias_t)
        wide = torch.promote_types(q_s.dtype, torch.float32)
        exact = torch.float32 if q_s.device.type == "mps" else torch.float64  # which MPS lacks
        total = -(scale_s * q_s.to(wide) * attend(teacher, k_c, explicit=False)).sum(dtype=exact)
        for part in _blocks(q_s):
            total += logits(student, part).logsumexp(-1).sum(dtype=exact)
            if bias_s is not None:
                p_t = logits(teacher, part).softmax(-1)
                total -= (p_t.sum(0) * bias_s[:, part]).sum(dtype=exact)
        return (total / _count(q_s)).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Detached: SDPA would leave its fast kernels for a bias that requires a gradient.
        saved: list[Any] = [None if x is None else x.detach() for x in ctx.saved_tensors]
        q_s, k_s, bias_s, q_t, k_t, bias_t = saved
        scale_s, scale_t = ctx.scales
        student, teacher = QK(q_s, k_s, scale_s, bias_s), QK(q_t, k_t, scale_t, bias_t)
        factor = grad / _count(q_s)

        # The two attentions P_s and P_t as functions of their value argument alone.
        with torch.enable_grad():
            value = _centred(k_s).requires_grad_()
            pulled_s, pulled_t = attend(student, value, explicit=False), attend(teacher, value, explicit=False)
        upstream = scale_s * q_s
        (back_s,) = torch.autograd.grad(pulled_s, value, upstream)
        (back_t,) = torch.autograd.grad(pulled_t, value, upstream)

        grad_q = (factor * scale_s * (pulled_s.detach() - pulled_t.detach())).to(q_s.dtype)
        grad_k = (factor * (back_s - back_t)).to(k_s.dtype)
        grad_bias = None
        if bias_s is not None and ctx.needs_input_grad[2]:
            parts = [(logits(student, p).softmax(-1) - logits(teacher, p).softmax(-1)).sum(0) for p in _blocks(q_s)]
            grad_bias = (factor * torch.cat(parts, dim=1)).to(bias_s.dtype)
        return grad_q, grad_k, grad_bias, None, None, None, None, None


def _centred(k: Tensor) -> Tensor:
    """Keys without their mean over tokens.

    What is common to all keys shifts each row of logits by a constant and changes no probability. Without it,
    ``P_s k - P_t k`` is the difference of two small numbers, which survives bf16 when the maps nearly agree.
    """
    return k - k.mean(-2, keepdim=True)


def _blocks(q: Tensor) -> list[slice]:
    """The queries in blocks of ``_ROWS``."""
    return [slice(first, first + _ROWS) for first in range(0, q.shape[-2], _ROWS)]


def _count(q: Tensor) -> int:
    """Rows of a map: images x heads x queries."""
    return q.shape[:-1].numel()
