"""Divergences between two attention maps, with exact gradients and no N x N tensor stored.

Each maps a teacher's map and a student's to a scalar in float32 or better: the sum over keys, mean over images,
heads and queries. Gradients reach the student's q, k and bias; none reaches the teacher.

Since the upstream gradient of a scalar is one number, each loss computes its gradients *along with its value* and
keeps only them: [B, H, N, d] twice, and [H, N, N] for a bias. The backward pass recomputes nothing, and one
autograd function serves all losses. There are three implementations (:func:`preferred` chooses):

*blocks*: forms maps for a few queries at a time (:mod:`blockwise`). Any loss, any map.
*sdpa*: builds on scaled dot-product attention and never forms any part of a map (:mod:`by_sdpa`). Cross-entropy, KL
and squared error only, if the teacher's map is a :class:`QK` and the student has no bias: a bias's gradient, and the
mean of the bias under the teacher's map, need blocks anyway.
*kernels*: forms both maps tile by tile on the chip (:mod:`kernels`). CUDA only, if the teacher's map is a :class:`QK`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from atdiag.transfer import blockwise, by_sdpa
from atdiag.transfer.blockwise import Sums
from atdiag.transfer.ops import QK, Averaged, Map, log_probabilities

Way = Literal["blocks", "sdpa", "kernels"]


def preferred(device: torch.device) -> Way:
    """Return the fastest implementation on a device, of those that exist there.

    On a CPU that is blocks, at every length (cross-entropy, one core: 1.6 times at 197 tokens, 1.8 at 1,370), and it is
    exact to the rounding of the result, in bf16 too. Kernels need Triton, which comes with PyTorch for CUDA on Linux.
    """
    if device.type == "cpu":
        return "blocks"
    return "kernels" if device.type == "cuda" and find_spec("triton") else "sdpa"


def cross_entropy(teacher: Map, student: QK, way: Way | None = None) -> Tensor:
    """Return ``-sum_k p_t log p_s`` in nats (Li et al. 2024, section 3.2)."""
    return _loss("ce", teacher, student, way)


def kl(teacher: Map, student: QK, way: Way | None = None) -> Tensor:
    """Return ``sum_k p_t log(p_t / p_s)`` in nats: cross-entropy minus the teacher's entropy, with equal gradients."""
    return _loss("kl", teacher, student, way)


def mse(teacher: Map, student: QK, way: Way | None = None) -> Tensor:
    """Return ``sum_k (p_s - p_t)^2``.

    By SDPA it cancels where maps nearly agree: its error is then absolute, about 1e-6.
    """
    return _loss("mse", teacher, student, way)


def jsd(teacher: Map, student: QK, way: Way | None = None) -> Tensor:
    """Return the Jensen-Shannon divergence of the rows in bits, from 0 (equal) to 1 (disjoint).

    By kernels its error is absolute, about 1e-7 for a row.
    """
    return _loss("jsd", teacher, student, way)


def l1(teacher: Map, student: QK, way: Way | None = None) -> Tensor:
    """Return ``sum_k |p_s - p_t|``, twice the total variation distance, from 0 to 2."""
    return _loss("l1", teacher, student, way)


def logits_mse(teacher: Map, student: QK) -> Tensor:
    """Return the mean over keys of ``(s - t)^2``, with each row of logits centred, which changes no probability."""
    if isinstance(teacher, Averaged):
        raise TypeError("an averaged map has no logits to compare: choose cross-entropy, mse, jsd or l1")
    # Forming the logits costs N^2 d, the Gram matrices N d^2.
    short = student.q.device.type == "cpu" and student.q.shape[-2] <= 3 * student.q.shape[-1]
    return _applied(
        teacher, student, partial(blockwise.in_blocks, blockwise.logits_mse_term) if short else by_sdpa.gram_logits_mse
    )


def entropy(map: Map) -> Tensor:
    """Return the mean entropy of a map's rows in nats, a scalar: the minimum of cross-entropy to that map.

    Forms the whole map if it requires a gradient, else one block at a time.
    """
    trained = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in map)
    if isinstance(map, QK) and not trained:
        rows = map.q.shape[:-1].numel()
        return (blockwise.entropy_sum(map) / rows).to(torch.promote_types(map.q.dtype, torch.float32))
    log_p = log_probabilities(map)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _loss(name: str, teacher: Map, student: QK, way: Way | None) -> Tensor:
    """Compute a loss by an implementation, as requested or by the rule, and only where possible."""
    way = way or preferred(student.q.device)
    if isinstance(teacher, QK):
        if way == "kernels" and not isinstance(student.q, FakeTensor):  # which has no memory for a kernel to read
            from atdiag.transfer import kernels

            if kernels.able(teacher, student):
                return _applied(teacher, student, partial(_by_kernels, name))
        if way != "blocks" and name in by_sdpa.LOSSES and student.bias is None:
            return _applied(teacher, student, by_sdpa.LOSSES[name])
    return _applied(teacher, student, partial(blockwise.in_blocks, blockwise.TERMS[name]))


def _applied(teacher: Map, student: QK, sums: Callable[[Any, QK, bool], Sums]) -> Tensor:
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
        sums: Callable[[Any, QK, bool], Sums],
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
        q, k, bias = ctx.saved_tensors
        q, k = _scaled(q, k, factor * ctx.scale, factor)
        return q, k, None if bias is None else bias * factor, None, None, None, None


def _scaled(q: Tensor | None, k: Tensor | None, by_q: Tensor, by_k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return two gradients [B, H, N, d], each times a scalar tensor."""
    if q is not None and k is not None and preferred(q.device) == "kernels" and not isinstance(q, FakeTensor):
        from atdiag.transfer import kernels

        if q.shape == k.shape and q.is_contiguous() and k.is_contiguous() and by_q.dtype == torch.float32:
            return kernels.times(q, k, by_q, by_k)
    return (None if q is None else q * by_q), (None if k is None else k * by_k)


def _by_kernels(name: str, teacher: QK, student: QK, wanted: bool) -> Sums:
    from atdiag.transfer import kernels

    return Sums(*kernels.sums(name, teacher, student, wanted))
