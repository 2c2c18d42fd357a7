"""The transfer methods: what a student's forward pass takes from its teacher, and which loss it adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from atdiag.core.spec import Network, Transfer
from atdiag.core.spec.losses import DEFAULT as DEFAULT_LOSS
from atdiag.core.spec.losses import function as map_loss_function
from atdiag.transfer import divergences, observation, ops
from atdiag.transfer.attention import AttentionOverride, indices, split_heads
from atdiag.transfer.observation import AttentionRecord, CaptureRequest, Observation
from atdiag.transfer.ops import QK, Map


class Learner(Protocol):
    """Interface of a student."""

    network: Network

    def observe(
        self,
        images: Tensor,
        wanted: CaptureRequest,
        given: Mapping[int, AttentionOverride] | None = None,
        keep: Tensor | None = None,
    ) -> Observation:
        """See :meth:`atdiag.networks.model.vit.ViT.observe`."""


class Passed(NamedTuple):
    """Outputs of a student's forward pass in training."""

    logits: Tensor
    """[B, classes]."""
    loss: Tensor | None
    """The weighted transfer loss, a scalar; None if the transfer has no loss."""


def forward(
    student: Learner, transfer: Transfer, images: Tensor, teacher: Observation, keep: Tensor | None = None
) -> Passed:
    """Run a student's forward pass in training.

    teacher: its observation for the request of :func:`observation.of_teacher`, on the student's tokens. keep: drop-path
    factors.
    """
    wanted = observation.of_student(transfer) | CaptureRequest(logits=True)
    own = student.observe(images, wanted, given(transfer, teacher, student.network, images.device), keep)
    assert own.logits is not None
    return Passed(own.logits, loss(transfer, teacher, own))


def loss(transfer: Transfer, teacher: Observation, own: Observation) -> Tensor | None:
    """Return the weighted transfer loss of a student's forward pass, a scalar; None if the transfer has no loss.

    teacher: as in :func:`forward`. own: the student's observation for :func:`observation.of_student`.
    """
    if transfer.weight is None:  # copy and none
        return None
    losses = torch.stack(_losses(transfer, teacher, own))
    return transfer.weight * (losses.mean() if transfer.reduce == "mean" else losses.sum())


def forward_test(student: Learner, transfer: Transfer, images: Tensor, teacher: Observation) -> Tensor:
    """Return a student's logits [B, classes] at test time; only a copy-student needs its teacher."""
    logits = student.observe(
        images, CaptureRequest(logits=True), given(transfer, teacher, student.network, images.device)
    ).logits
    assert logits is not None
    return logits


def needs_teacher_at_test(transfer: Transfer) -> bool:
    """Return whether the trained student works only together with its teacher."""
    return transfer.method == "copy"


def excess(transfer: Transfer, teacher: Observation, ce: Tensor) -> Tensor:
    """Return the KL divergence behind a weighted cross-entropy loss: mean over layers, in nats.

    It is cross-entropy minus the teacher's entropy, with the same gradient: a number to report, zero where the
    student's maps equal the teacher's.
    """
    assert transfer.weight is not None
    maps = _maps(transfer, teacher)
    floor = torch.stack([divergences.entropy(one) for one in maps.values()]).mean()
    return ce / transfer.weight / (len(maps) if transfer.reduce == "sum" else 1) - floor


def given(
    transfer: Transfer, teacher: Observation, student: Network, device: torch.device
) -> dict[int, AttentionOverride] | None:
    """Return the overrides of a copy-student's blocks; None for any other student.

    teacher: its observation for the request of :func:`observation.of_teacher`, on the student's tokens.
    """
    if transfer.method != "copy":
        return None
    pairs = dict(zip(transfer.layers, transfer.sources, strict=True))
    some = {layer: _heads(transfer, teacher, source) for layer, source in pairs.items()}
    heads = {layer: None if one is None else split_heads(one, student.heads, device) for layer, one in some.items()}
    if transfer.tensor == "map":
        return {layer: AttentionOverride("map", one, heads[layer]) for layer, one in _maps(transfer, teacher).items()}
    return {
        layer: AttentionOverride(transfer.tensor, _tensor(transfer, teacher.seen[source], some[layer]), heads[layer])
        for layer, source in pairs.items()
    }


def _losses(transfer: Transfer, teacher: Observation, own: Observation) -> list[Tensor]:
    """Return the unweighted transfer loss of each layer (for logits, of the network's output)."""
    if transfer.method == "logits":
        assert own.logits is not None and teacher.logits is not None and transfer.temperature is not None
        return [hinton(teacher.logits, own.logits, transfer.temperature)]
    pairs = dict(zip(transfer.layers, transfer.sources, strict=True))
    if transfer.method == "features":
        return [feature_mse(teacher.features[source], own.features[layer]) for layer, source in pairs.items()]
    some = {layer: _heads(transfer, teacher, source) for layer, source in pairs.items()}
    if transfer.tensor == "map":
        divergence = map_loss_function(transfer.loss or DEFAULT_LOSS)
        maps = _maps(transfer, teacher)
        return [divergence(one, _own(own.seen[layer], some[layer])) for layer, one in maps.items()]
    return [
        F.mse_loss(
            _wide(_tensor(transfer, own.seen[layer], some[layer])),
            _wide(_tensor(transfer, teacher.seen[source], some[layer])),
        )
        for layer, source in pairs.items()
    ]


def hinton(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` for logits [B, classes], mean over the batch.

    The factor T^2 makes the size of the gradient independent of the temperature (Hinton et al. 2015, section 2).
    """
    target = (_wide(teacher) / temperature).log_softmax(-1)
    own = (_wide(student) / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(own, target, log_target=True, reduction="batchmean")


def feature_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean squared difference of residual streams [B, N, C], each token standardised over channels.

    Every block, too, normalises the stream before reading it. Without this, a few tokens of large norm, as in DINOv2
    and CLIP, would dominate the loss (whitening as in Wei et al. 2022, Contrastive learning rivals masked image
    modeling in fine-tuning via feature distillation, section 3).
    """
    one, other = (F.layer_norm(_wide(x), x.shape[-1:]) for x in (teacher, student))
    return F.mse_loss(other, one)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _maps(transfer: Transfer, teacher: Observation) -> dict[int, Map]:
    """Return student block -> the teacher's map for it, of the selected heads, averaged if requested."""
    if transfer.average == "examples":
        return {
            layer: teacher.averages[source] for layer, source in zip(transfer.layers, transfer.sources, strict=True)
        }
    maps = [_map(teacher.seen[source], _heads(transfer, teacher, source)) for source in transfer.sources]
    out: list[Any] = maps if transfer.average is None else ops.average(maps, transfer.average)
    return dict(zip(transfer.layers, out, strict=True))


def _heads(transfer: Transfer, teacher: Observation, source: int) -> tuple[int, ...] | None:
    """Return the heads that one of the teacher's blocks passes on; None for all of them.

    Raises ValueError if they are to be chosen and were not.
    """
    if transfer.different_heads is None:
        return transfer.heads
    if source not in teacher.heads:
        raise ValueError("the teacher's heads have not been chosen")
    return teacher.heads[source]


def _map(seen: AttentionRecord, heads: tuple[int, ...] | None) -> Map:
    """Return the teacher's map of the selected heads."""
    if heads is None:
        return seen.map
    device = seen.map.q.device if isinstance(seen.map, QK) else seen.map.p.device
    return seen.map.select_heads(indices(heads, device))


def _own(seen: AttentionRecord, heads: tuple[int, ...] | None) -> QK:
    """Return the student's map of the selected heads."""
    return seen.qk if heads is None else seen.qk.select_heads(indices(heads, seen.qk.q.device))


def _tensor(transfer: Transfer, seen: AttentionRecord, heads: tuple[int, ...] | None) -> Tensor:
    """Return q, k or v [B, h, N, d] of the selected heads."""
    tensor = seen.v if transfer.tensor == "v" else getattr(seen.qk, transfer.tensor)
    assert isinstance(tensor, Tensor)
    return tensor if heads is None else tensor[:, indices(heads, tensor.device)]
