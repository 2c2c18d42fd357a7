"""Divergences built on scaled dot-product attention (SDPA), which never form any part of a map.

See :mod:`atdiag.transfer.divergences`, of which this is one implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atdiag.transfer import sdpa
from atdiag.transfer.blockwise import Sums, entropy_sum, total
from atdiag.transfer.ops import QK, blocks, logits


class _Pulled:
    """A map of fixed q, k applied to values: the output, the rows' log-sum-exp, and the gradient to the values."""

    def __init__(self, map: QK, value: Tensor) -> None:
        self.map = map
        with torch.enable_grad():
            self.value = value.detach().requires_grad_()
            self._out = sdpa.attention(map.q, map.k, self.value, map.scale, map.bias)
        wide = torch.promote_types(map.q.dtype, torch.float32)
        self.out = self._out.detach().to(wide)

    def logsumexp(self) -> Tensor:
        """Return the log-sum-exp [B, H, N]: the kernel's own, else from logits block by block."""
        if (kept := sdpa.logsumexp(self._out)) is not None:
            return kept.detach()
        map = self.map.widened()
        out = map.q.new_empty(map.q.shape[:3])
        for block in blocks(map.q):
            out[block] = logits(map.part(block)).logsumexp(-1)
        return out

    def back(self, upstream: Tensor) -> Tensor:
        """Return ``P^T upstream`` [B, H, N, e], in float32 or better."""
        upstream = upstream.to(self._out.dtype)
        (grad,) = torch.autograd.grad(self._out, self.value, upstream)
        return grad.to(self.out.dtype)


def _cross_entropy(teacher: QK, student: QK, wanted: bool) -> Sums:
    """Compute cross-entropy as ``lse(s) - scale q_s . (P_t k_s)``, with gradient ``p_s - p_t`` to the logits.

    So ``grad q_s = scale (P_s k_s - P_t k_s)``, and ``grad k_s`` is the difference of the gradients that the two
    attentions return to their value argument for upstream ``scale q_s``. Keys serve as values after subtracting their
    mean over tokens, which changes no probability: ``P_s k - P_t k`` is a small difference where the maps nearly agree
    and would otherwise be lost in bf16.
    """
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in student[:2])
    q, mean = q * student.scale, k.mean(-2, keepdim=True)
    centred = (k - mean).to(student.k.dtype)
    own, theirs = _Pulled(student, centred), _Pulled(teacher, centred)
    value = total(own.logsumexp()) - total(q * (theirs.out + mean))
    if not wanted:
        return Sums(value)
    return Sums(value, own.out - theirs.out, own.back(q) - theirs.back(q))


def _kl(teacher: QK, student: QK, wanted: bool) -> Sums:
    sums = _cross_entropy(teacher, student, wanted)
    return sums._replace(value=sums.value - entropy_sum(teacher))


def _mse(teacher: QK, student: QK, wanted: bool) -> Sums:
    """Compute squared error from log-sum-exps of s, t, 2s, 2t, s + t: ``sum p_s^2 = exp(lse(2s) - 2 lse(s))`` etc.

    s + t are the logits of q and k concatenated along the head width. With a = sum p_s^2 and b = sum p_s p_t, the
    gradient to the logits is ``2a (P_2s - P_s) - 2b (P_s+t - P_s)``: again attentions.
    """
    wide = torch.promote_types(student.q.dtype, torch.float32)
    q, k = student.q, student.k.to(wide)
    centred = (k - k.mean(-2, keepdim=True)).to(student.k.dtype)
    # Use one scale for both: exact, in bf16 too, if they are equal or their ratio is a power of two.
    other = teacher.q * (teacher.scale / student.scale)
    both = QK(torch.cat([q, other], -1), torch.cat([student.k, teacher.k], -1), student.scale, teacher.bias)
    once, twice, mixed = (_Pulled(map, centred) for map in (student, _doubled(student), both))
    lse, lse_t = once.logsumexp(), _Pulled(teacher, teacher.k).logsumexp()
    own = (twice.logsumexp() - 2 * lse).exp()
    shared = (mixed.logsumexp() - lse - lse_t).exp()
    theirs = (_Pulled(_doubled(teacher), teacher.k).logsumexp() - 2 * lse_t).exp()
    value = total(own) - 2 * total(shared) + total(theirs)
    if not wanted:
        return Sums(value)
    a, b, q = 2 * own[..., None], 2 * shared[..., None], q.to(wide) * student.scale
    grad_q = a * (twice.out - once.out) - b * (mixed.out - once.out)
    grad_k = twice.back(a * q) - mixed.back(b * q) - once.back((a - b) * q)
    return Sums(value, grad_q, grad_k)


def _doubled(map: QK) -> QK:
    """Return the map with doubled logits."""
    return QK(map.q, map.k, 2 * map.scale, None if map.bias is None else 2 * map.bias)


def gram_logits_mse(teacher: QK, student: QK, wanted: bool) -> Sums:
    """Compute the squared norm of ``X = q k^T + c`` without X: q, k of both concatenated, c their biases' difference.

    ``|q k^T|^2 = <q^T q, k^T k>`` needs products of two matrices of twice the head width; with c the same for all
    images, ``<q k^T, c> = <q, c k>``. Rows of X are centred by centring k and c over keys, and so are the gradients.
    """
    (q, k, c), width = _difference(teacher, student), student.q.shape[-1]
    k = k - k.mean(-2, keepdim=True)
    of_q, of_k = q.transpose(-2, -1) @ q, k.transpose(-2, -1) @ k
    value = total(of_q * of_k)
    grad_q: Tensor | None = None
    grad_k: Tensor | None = None
    grad_bias: Tensor | None = None
    if wanted:
        grad_q, grad_k = q @ of_k[..., :width], k @ of_q[..., :width]
    if c is not None:
        # einsum folds the images into columns; matmul would copy c for every image.
        c = c - c.mean(-1, keepdim=True)
        pulled = torch.einsum("hqk,bhkd->bhqd", c, k)
        value += 2 * total(q * pulled) + q.shape[0] * total(c.square())
        if grad_q is not None and grad_k is not None:
            grad_q += pulled[..., :width]
            grad_k += torch.einsum("hqk,bhqd->bhkd", c, q[..., :width])
            if student.bias is not None:
                grad_bias = torch.einsum("bhqd,bhkd->hqk", q, k) + q.shape[0] * c
    tokens = k.shape[-2]
    gradients = (grad_q, grad_k, grad_bias)
    return Sums(value / tokens, *(None if g is None else g.mul_(2 / tokens) for g in gradients))


def _difference(teacher: QK, student: QK) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q, k, bias of the student's logits minus the teacher's: head widths concatenated."""
    own, theirs = student.widened(), teacher.widened()
    bias = own.bias if theirs.bias is None else -theirs.bias if own.bias is None else own.bias - theirs.bias
    return torch.cat([own.q, -theirs.q], -1), torch.cat([own.k, theirs.k], -1), bias


LOSSES = {"ce": _cross_entropy, "kl": _kl, "mse": _mse}
