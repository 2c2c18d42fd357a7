"""The transfer methods: what a student's forward pass takes from its teacher's maps, and what loss it adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from atdiag.spec import Transfer
from atdiag.transfer import ops
from atdiag.transfer.ops import QK


class TakesMaps(Protocol):
    """A student."""

    def __call__(
        self,
        images: Tensor,
        given: Mapping[int, QK] | None = None,
        captured: dict[int, QK] | None = None,
        capture: tuple[int, ...] = (),
        keep: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`atdiag.networks.vit.ViT.forward`."""


def forward(
    student: TakesMaps,
    transfer: Transfer,
    images: Tensor,
    teacher: Mapping[int, QK],
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A student's training forward: logits [B, classes] and the transfer loss (a scalar, weighted) or None.

    teacher: the teacher's maps of at least ``transfer.layers``, on the student's tokens. keep: drop-path factors.
    """
    if transfer.method == "copy":
        return student(images, given={layer: teacher[layer] for layer in transfer.layers}, keep=keep), None
    if transfer.method == "distill":
        own: dict[int, QK] = {}
        logits = student(images, captured=own, capture=transfer.layers, keep=keep)
        losses = [ops.cross_entropy(teacher[layer], own[layer]) for layer in transfer.layers]
        assert transfer.weight is not None
        return logits, transfer.weight * torch.stack(losses).sum()
    return student(images, keep=keep), None


def forward_test(student: TakesMaps, transfer: Transfer, images: Tensor, teacher: Mapping[int, QK]) -> Tensor:
    """A student's logits [B, classes] at test time: one that copies needs its teacher's maps, any other none."""
    if transfer.method == "copy":
        return student(images, given={layer: teacher[layer] for layer in transfer.layers})
    return student(images)


def layers_at_test(transfer: Transfer) -> tuple[int, ...]:
    """The blocks whose teacher maps the trained student needs at test time."""
    return transfer.layers if transfer.method == "copy" else ()
