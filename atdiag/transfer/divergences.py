"""Divergences between two attention maps, with exact gradients and no N x N tensor stored.

Each maps a teacher's map and a student's to a scalar in float32 or better: the sum over keys, mean over images,
heads and queries. Gradients reach the student's q, k and bias; none reaches the teacher.

Since the upstream gradient of a scalar is one number, each loss computes its gradients *along with its value* and
keeps only them: [B, H, N, d] twice, and [H, N, N] for a bias. The backward pass recomputes nothing, and one
autograd function serves all losses. There are two implementations (:func:`prefers_blocks` chooses):

*blocks*: forms maps for a few queries at a time. Any loss, any map.
*fused*: builds on scaled dot-product attention (SDPA) and never forms any part of a map. Cross-entropy, KL and
squared error only, if the teacher's map is a :class:`QK` and the student has no bias: a bias's gradient, and the mean
of the bias under the teacher's map, need blocks anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atdiag.transfer import sdpa
from atdiag.transfer.ops import QK, Averaged, Map, blocks, log_probabilities, logits, probabilities


class _Sums(NamedTuple):
    """A loss summed over all rows and, if requested, the gradients of that sum to scale * q, k and bias."""

    value: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    bias: Tensor | None = None


Term = Callable[[Tensor, Map, bool], tuple[Tensor, Tensor]]
"""A loss on one block: (student's logits s, teacher's map, whether gradients are wanted) -> (loss of each row, gradient
to s). Without gradients the second value is arbitrary. May overwrite s."""


def prefers_blocks(device: torch.device) -> bool:
    """Return whether forming maps block by block is the faster implementation on a device.

    On a CPU it is, at every length (cross-entropy, one core: 1.6 times at 197 tokens, 1.8 at 1,370), and it is exact to
    the rounding of the result, in bf16 too.
    """
    return device.type == "cpu"


def cross_entropy(teacher: Map, student: QK, fused: bool | None = None) -> Tensor:
    """Return ``-sum_k p_t log p_s`` in nats (Li et al. 2024, section 3.2)."""
    return _loss(
        teacher, student, _fused_cross_entropy if _fuses(teacher, student, fused) else partial(_in_blocks, _ce_term)
    )


def kl(teacher: Map, student: QK, fused: bool | None = None) -> Tensor:
    """Return ``sum_k p_t log(p_t / p_s)`` in nats: cross-entropy minus the teacher's entropy, with equal gradients."""
    return _loss(teacher, student, _fused_kl if _fuses(teacher, student, fused) else partial(_in_blocks, _kl_term))


def mse(teacher: Map, student: QK, fused: bool | None = None) -> Tensor:
    """Return ``sum_k (p_s - p_t)^2``.

    The fused implementation cancels where maps nearly agree: its error is absolute, about 1e-6.
    """
    return _loss(teacher, student, _fused_mse if _fuses(teacher, student, fused) else partial(_in_blocks, _mse_term))


def jsd(teacher: Map, student: QK) -> Tensor:
    """Return the Jensen-Shannon divergence of the rows in bits, from 0 (equal) to 1 (disjoint)."""
    return _loss(teacher, student, partial(_in_blocks, _jsd_term))


def l1(teacher: Map, student: QK) -> Tensor:
    """Return ``sum_k |p_s - p_t|``, twice the total variation distance, from 0 to 2."""
    return _loss(teacher, student, partial(_in_blocks, _l1_term))


def logits_mse(teacher: Map, student: QK) -> Tensor:
    """Return the mean over keys of ``(s - t)^2``, with each row of logits centred, which changes no probability."""
    if isinstance(teacher, Averaged):
        raise TypeError("an averaged map has no logits to compare: choose cross-entropy, mse, jsd or l1")
    # Forming the logits costs N^2 d, the Gram matrices N d^2.
    short = prefers_blocks(student.q.device) and student.q.shape[-2] <= 3 * student.q.shape[-1]
    return _loss(teacher, student, partial(_in_blocks, _logits_mse_term) if short else _gram_logits_mse)


def entropy(map: Map) -> Tensor:
    """Return the mean entropy of a map's rows in nats, a scalar: the minimum of cross-entropy to that map.

    Forms the whole map if it requires a gradient, else one block at a time.
    """
    trained = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in map)
    if isinstance(map, QK) and not trained:
        rows = map.q.shape[:-1].numel()
        return (_entropy_sum(map) / rows).to(torch.promote_types(map.q.dtype, torch.float32))
    log_p = log_probabilities(map)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _fuses(teacher: Map, student: QK, fused: bool | None) -> bool:
    """Return whether to use SDPA: as requested or by the rule, and only where possible."""
    wanted = not prefers_blocks(student.q.device) if fused is None else fused
    return wanted and isinstance(teacher, QK) and student.bias is None


def _loss(teacher: Map, student: QK, sums: Callable[[Any, QK, bool], _Sums]) -> Tensor:
    _check(teacher, student)
    value: Tensor = _Loss.apply(
        student.q, student.k, student.bias, student.scale, teacher, sums, torch.is_grad_enabled()
    )
    return value


def _check(teacher: Map, student: QK) -> None:
    shape = torch.Size([*student.q.shape[:3], student.k.shape[-2]])
    if isinstance(teacher, QK):
        theirs = torch.Size([*teacher.q.shape[:3], teacher.k.shape[-2]])
        fits = theirs == shape
    else:
        theirs = teacher.p.shape
        fits = len(theirs) == 4 and all(a in (b, 1) for a, b in zip(theirs[:3], shape[:3], strict=True))
        fits = fits and theirs[3] == shape[3]
    if not fits:
        raise ValueError(f"the maps don't line up: teacher {list(theirs)}, student {list(shape)} (B, H, N, N)")


class _Loss(torch.autograd.Function):
    """A scalar whose gradients were computed along with its value."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        scale: float,
        teacher: Map,
        sums: Callable[[Any, QK, bool], _Sums],
        grad_enabled: bool,
    ) -> Tensor:
        wanted = grad_enabled and any(ctx.needs_input_grad)
        student = QK(q.detach(), k.detach(), scale, None if bias is None else bias.detach())
        with torch.autocast(q.device.type, enabled=False):
            value, *grads = sums(teacher, student, wanted)
        ctx.scale, ctx.rows = scale, (rows := q.shape[:-1].numel())
        # Keep the gradients of the sum over rows, in the inputs' type: those of the mean may be too small for float16.
        kept = (g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, (q, k, bias), strict=True))
        ctx.save_for_backward(*kept)
        return (value / rows).to(torch.promote_types(q.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.rows
        factors = (factor * ctx.scale, factor, factor)
        grads = (None if g is None else g * f for g, f in zip(ctx.saved_tensors, factors, strict=True))
        return *grads, None, None, None, None


def _in_blocks(term: Term, teacher: Map, student: QK, wanted: bool) -> _Sums:
    """Compute a loss and its gradients from maps that are formed for a few queries at a time."""
    student, teacher = student.widened(), teacher.widened()
    q, k, bias = student.q, student.k, student.bias
    value = _zero(q)
    if len(parts := list(blocks(q))) == 1:  # nothing to gather
        loss, grad = term(logits(student), teacher, wanted)
        value = loss.sum(dtype=value.dtype)
        if not wanted:
            return _Sums(value)
        return _Sums(value, grad @ k, grad.transpose(-2, -1) @ q, None if bias is None else grad.sum(0))
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    for block in parts:
        loss, grad = term(logits(student.part(block)), teacher.part(block), wanted)
        value += loss.sum(dtype=value.dtype)
        if wanted:
            keys, rows = block[:2], block[2]
            grad_q[block] = grad @ k[keys]
            pulled = grad.transpose(-2, -1) @ q[block]
            grad_k[keys] = pulled if rows.start == 0 else pulled.add_(grad_k[keys])
            if grad_bias is not None:
                grad_bias[block[1:]] += grad.sum(0)
    return _Sums(value, grad_q, grad_k, grad_bias) if wanted else _Sums(value)


def _ce_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    log_p, target = s.log_softmax(-1), probabilities(teacher)
    loss = -(target * log_p).sum(-1)
    return loss, log_p.exp_().sub_(target) if wanted else s


def _kl_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    log_p, log_t = s.log_softmax(-1), log_probabilities(teacher)
    target = log_t.exp()
    loss = (target * (log_t - log_p)).sum(-1)
    return loss, log_p.exp_().sub_(target) if wanted else s


def _mse_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    p = s.softmax(-1)
    difference = p - probabilities(teacher)
    return difference.square().sum(-1), _through_softmax(p, 2 * difference) if wanted else s


def _l1_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    p = s.softmax(-1)
    difference = p - probabilities(teacher)
    return difference.abs().sum(-1), _through_softmax(p, difference.sign()) if wanted else s


def _jsd_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    """Compute the JSD of logits from x = log p_s - log p_t: with m the mean map, ``log p_s/m = log(2 / (1 + e^-x))``.

    Exact near x = 0.
    """
    log_p, log_t = s.log_softmax(-1), log_probabilities(teacher)
    x = log_p - log_t
    common = torch.log1p(torch.expm1(-x.abs()) / 2)  # log p_s/m = min(x, 0) - common, log p_t/m = min(-x, 0) - common
    p, own = log_p.exp_(), (x.clamp_max(0) - common)
    theirs = (-x).clamp_max(0) - common
    loss = (p * own + log_t.exp() * theirs).sum(-1) / (2 * math.log(2))
    return loss, _through_softmax(p, own / (2 * math.log(2))) if wanted else s


def _logits_mse_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    assert isinstance(teacher, QK)
    s -= logits(teacher)
    s -= s.mean(-1, keepdim=True)
    return s.square().mean(-1), s.mul_(2 / s.shape[-1])


def _through_softmax(p: Tensor, grad: Tensor) -> Tensor:
    """Convert the gradient to a map p into the gradient to its logits."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))


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


def _fused_cross_entropy(teacher: QK, student: QK, wanted: bool) -> _Sums:
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
    value = _sum(own.logsumexp()) - _sum(q * (theirs.out + mean))
    if not wanted:
        return _Sums(value)
    return _Sums(value, own.out - theirs.out, own.back(q) - theirs.back(q))


def _fused_kl(teacher: QK, student: QK, wanted: bool) -> _Sums:
    sums = _fused_cross_entropy(teacher, student, wanted)
    return sums._replace(value=sums.value - _entropy_sum(teacher))


def _fused_mse(teacher: QK, student: QK, wanted: bool) -> _Sums:
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
    value = _sum(own) - 2 * _sum(shared) + _sum(theirs)
    if not wanted:
        return _Sums(value)
    a, b, q = 2 * own[..., None], 2 * shared[..., None], q.to(wide) * student.scale
    grad_q = a * (twice.out - once.out) - b * (mixed.out - once.out)
    grad_k = twice.back(a * q) - mixed.back(b * q) - once.back((a - b) * q)
    return _Sums(value, grad_q, grad_k)


def _doubled(map: QK) -> QK:
    """Return the map with doubled logits."""
    return QK(map.q, map.k, 2 * map.scale, None if map.bias is None else 2 * map.bias)


def _gram_logits_mse(teacher: QK, student: QK, wanted: bool) -> _Sums:
    """Compute the squared norm of ``X = q k^T + c`` without X: q, k of both concatenated, c their biases' difference.

    ``|q k^T|^2 = <q^T q, k^T k>`` needs products of two matrices of twice the head width; with c the same for all
    images, ``<q k^T, c> = <q, c k>``. Rows of X are centred by centring k and c over keys, and so are the gradients.
    """
    (q, k, c), width = _difference(teacher, student), student.q.shape[-1]
    k = k - k.mean(-2, keepdim=True)
    of_q, of_k = q.transpose(-2, -1) @ q, k.transpose(-2, -1) @ k
    value = _sum(of_q * of_k)
    grad_q: Tensor | None = None
    grad_k: Tensor | None = None
    grad_bias: Tensor | None = None
    if wanted:
        grad_q, grad_k = q @ of_k[..., :width], k @ of_q[..., :width]
    if c is not None:
        # einsum folds the images into columns; matmul would copy c for every image.
        c = c - c.mean(-1, keepdim=True)
        pulled = torch.einsum("hqk,bhkd->bhqd", c, k)
        value += 2 * _sum(q * pulled) + q.shape[0] * _sum(c.square())
        if grad_q is not None and grad_k is not None:
            grad_q += pulled[..., :width]
            grad_k += torch.einsum("hqk,bhqd->bhkd", c, q[..., :width])
            if student.bias is not None:
                grad_bias = torch.einsum("bhqd,bhkd->hqk", q, k) + q.shape[0] * c
    tokens = k.shape[-2]
    gradients = (grad_q, grad_k, grad_bias)
    return _Sums(value / tokens, *(None if g is None else g.mul_(2 / tokens) for g in gradients))


def _difference(teacher: QK, student: QK) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q, k, bias of the student's logits minus the teacher's: head widths concatenated."""
    own, theirs = student.widened(), teacher.widened()
    bias = own.bias if theirs.bias is None else -theirs.bias if own.bias is None else own.bias - theirs.bias
    return torch.cat([own.q, -theirs.q], -1), torch.cat([own.k, theirs.k], -1), bias


def _entropy_sum(map: QK) -> Tensor:
    map = map.widened()
    total = _zero(map.q)
    with torch.autocast(map.q.device.type, enabled=False):
        for block in blocks(map.q):
            log_p = log_probabilities(map.part(block))
            total -= (log_p.exp() * log_p).sum(dtype=total.dtype)
    return total


def _zero(like: Tensor) -> Tensor:
    """Return a zero accumulator, in float64 except on MPS, which lacks it."""
    return torch.zeros((), dtype=torch.float32 if like.device.type == "mps" else torch.float64, device=like.device)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=_zero(x).dtype)
