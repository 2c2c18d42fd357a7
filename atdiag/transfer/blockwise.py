"""Divergences from maps that are formed for a few queries at a time: any loss, any map.

See :mod:`atdiag.transfer.divergences`, of which this is one implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from atdiag.transfer.ops import QK, Map, blocks, log_probabilities, logits, probabilities


class Sums(NamedTuple):
    """A loss summed over all rows and, if requested, the gradients of that sum to scale * q, k and bias."""

    value: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    bias: Tensor | None = None


Term = Callable[[Tensor, Map, bool], tuple[Tensor, Tensor]]
"""A loss on one block: (student's logits s, teacher's map, whether gradients are wanted) -> (loss of each row, gradient
to s). Without gradients the second value is arbitrary. May overwrite s."""


def in_blocks(term: Term, teacher: Map, student: QK, wanted: bool) -> Sums:
    """Compute a loss and its gradients from maps that are formed for a few queries at a time."""
    student, teacher = student.widened(), teacher.widened()
    q, k, bias = student.q, student.k, student.bias
    value = _zero(q)
    if len(parts := list(blocks(q))) == 1:  # nothing to gather
        loss, grad = term(logits(student), teacher, wanted)
        value = loss.sum(dtype=value.dtype)
        if not wanted:
            return Sums(value)
        return Sums(value, grad @ k, grad.transpose(-2, -1) @ q, None if bias is None else grad.sum(0))
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
    return Sums(value, grad_q, grad_k, grad_bias) if wanted else Sums(value)


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


def logits_mse_term(s: Tensor, teacher: Map, wanted: bool) -> tuple[Tensor, Tensor]:
    """Compare centred logits: a :data:`Term`."""
    assert isinstance(teacher, QK)
    s -= logits(teacher)
    s -= s.mean(-1, keepdim=True)
    return s.square().mean(-1), s.mul_(2 / s.shape[-1])


def _through_softmax(p: Tensor, grad: Tensor) -> Tensor:
    """Convert the gradient to a map p into the gradient to its logits."""
    return p * (grad - (p * grad).sum(-1, keepdim=True))


TERMS: dict[str, Term] = {"ce": _ce_term, "kl": _kl_term, "mse": _mse_term, "jsd": _jsd_term, "l1": _l1_term}


def entropy_sum(map: QK) -> Tensor:
    """Return the entropy of a map's rows in nats, summed over all rows."""
    map = map.widened()
    found = _zero(map.q)
    with torch.autocast(map.q.device.type, enabled=False):
        for block in blocks(map.q):
            log_p = log_probabilities(map.part(block))
            found -= (log_p.exp() * log_p).sum(dtype=found.dtype)
    return found


def _zero(like: Tensor) -> Tensor:
    """Return a zero accumulator, in float64 except on MPS, which lacks it."""
    return torch.zeros((), dtype=torch.float32 if like.device.type == "mps" else torch.float64, device=like.device)


def total(x: Tensor) -> Tensor:
    """Return the sum of all elements, accumulated in float64 where the device has it."""
    return x.sum(dtype=_zero(x).dtype)
