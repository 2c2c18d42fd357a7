"""Random maps, and every loss by the formula of its definition, in float64."""

import math

import torch
from torch import Tensor

from atdiag.transfer.ops import QK, Averaged

KNOWN = {"batch": 2, "heads": 3, "teacher_width": 5, "student_width": 8, "scale": 0.3, "seed": 0}


def make(sizes: dict, dtype=torch.float32) -> tuple[QK, QK]:
    generator = torch.Generator().manual_seed(sizes["seed"])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def one(width, scale, bias):
        shape = sizes["batch"], sizes["heads"], sizes["tokens"]
        return QK(normal(*shape, width), normal(*shape, width), scale, normal(*shape[1:], shape[2]) if bias else None)

    teacher = one(sizes["teacher_width"], 0.5, sizes["teacher_bias"])
    return teacher, one(sizes["student_width"], sizes["scale"], sizes["student_bias"])


def tensors(qk: QK) -> list[Tensor]:
    return [x for x in (qk.q, qk.k, qk.bias) if x is not None]


def changed(qk: QK, change) -> QK:
    return QK(change(qk.q), change(qk.k), qk.scale, None if qk.bias is None else change(qk.bias))


def leaves(qk: QK, dtype=None) -> QK:
    return changed(qk, lambda x: x.detach().to(dtype or x.dtype, copy=True).requires_grad_())


def the_logits(qk: QK) -> Tensor:
    scores = qk.scale * torch.einsum("bhqd,bhkd->bhqk", qk.q.double(), qk.k.double())
    return scores + (0 if qk.bias is None else qk.bias.double())


def the_map(map) -> Tensor:
    return map.p.double() if isinstance(map, Averaged) else the_logits(map).softmax(-1)


def log_of(p: Tensor) -> Tensor:
    return p.clamp_min(1e-300).log()


def the_jsd(t: Tensor, s: Tensor) -> Tensor:
    middle = (t + s) / 2
    return (t * (log_of(t) - log_of(middle)) + s * (log_of(s) - log_of(middle))) / (2 * math.log(2))


DEFINED = {
    "ce": lambda t, s: -t * log_of(s),
    "kl": lambda t, s: t * (log_of(t) - log_of(s)),
    "mse": lambda t, s: (s - t).square(),
    "jsd": the_jsd,
    "l1": lambda t, s: (s - t).abs(),
}


def the_loss(name: str, teacher, student: QK) -> Tensor:
    if name == "logits_mse":
        difference = the_logits(student) - the_logits(teacher)
        return (difference - difference.mean(-1, keepdim=True)).square().mean()
    return DEFINED[name](the_map(teacher), the_map(student)).sum(-1).mean()


def value_and_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]
