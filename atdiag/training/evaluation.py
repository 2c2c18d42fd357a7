"""Measuring a subject on the test images: anything that gives logits, a copy-student together with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.core.runs import DamagedRunError, Run
from atdiag.core.spec import Network, RunSpec, Teacher, Transfer
from atdiag.data import datasets, loader
from atdiag.data.datasets import Split
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import files
from atdiag.networks.weights.sources import WeightsError
from atdiag.training.predictions import Predictions
from atdiag.transfer import methods, ops
from atdiag.transfer.attention import indices
from atdiag.transfer.observation import CaptureRequest, Observation, of_teacher
from atdiag.transfer.ops import Averaged

__all__ = ["Predictions", "Predictor", "averages", "fit", "load_subject", "predict"]

BATCH = 256

AVERAGED_IMAGES = 2048
"""Over how many training images a teacher's map is averaged, where it is averaged over examples."""


@dataclass
class Predictor:
    """A network that can be evaluated or traced; one that copies, together with the teacher it needs at test time."""

    network: ViT
    transfer: Transfer = field(default_factory=Transfer)
    teacher: ViT | Foreign | None = None
    averages: Mapping[int, Averaged] = field(default_factory=dict)
    """The teacher's maps averaged over examples, for a student that copies those."""


def load_subject(run: Run, load_teacher: Callable[[Teacher], ViT | Foreign]) -> Predictor:
    """A finished run's student, frozen, together with the teacher that it needs at test time, if it needs one.

    Raises DamagedRunError where the run's weights can't be read, or are not those that it ended with.
    """
    spec = run.spec
    network = ViT(spec.network)
    run.sound(run.weights)
    try:
        network.load_state_dict(files.tensors(run.weights))
    except (WeightsError, OSError, RuntimeError) as fault:  # RuntimeError: they are another network's
        raise DamagedRunError(run.weights, fault) from None
    network.eval().requires_grad_(False)
    if not methods.needs_teacher_at_test(spec.transfer):
        return Predictor(network, spec.transfer)
    assert spec.teacher is not None
    teacher = load_teacher(spec.teacher)
    return Predictor(network, spec.transfer, teacher, averages(spec, teacher))


def averages(spec: RunSpec, teacher: ViT | Foreign, images: Split | None = None) -> dict[int, Averaged]:
    """The teacher's maps averaged over examples, by block, if the run's transfer takes those; else empty.

    Over the first ``AVERAGED_IMAGES`` of its training images, as they are (not augmented): one map [H, N, N] for each
    block, the same for every image, in training and at test. It holds what a map has of positions, and nothing of what
    is in an image. ``images``: those training images, where they are at hand.
    """
    transfer = spec.transfer
    if transfer.average != "examples":
        return {}
    images = datasets.train_split(spec.data, spec.seed.data) if images is None else images
    device = next(teacher.parameters()).device
    count = min(len(images), AVERAGED_IMAGES)
    sums: dict[int, Tensor] = {}
    for start in range(0, count, BATCH):
        pixels = _on(device, torch.from_numpy(images.batch(start, min(start + BATCH, count))))
        with torch.no_grad():
            shown = teacher.observe(pixels, CaptureRequest(maps=frozenset(transfer.sources)))
        for layer, seen in fit(shown, teacher, spec.network).seen.items():
            chosen = seen.qk if transfer.heads is None else seen.qk.select_heads(indices(transfer.heads, device))
            total = ops.logits(chosen).softmax(-1).sum(0, keepdim=True)
            sums[layer] = total if layer not in sums else sums[layer] + total
    return {layer: Averaged(total / count) for layer, total in sums.items()}


def fit(observation: Observation, teacher: ViT | Foreign, student: Network) -> Observation:
    """What a teacher showed, on the student's tokens: registers that it lacks are sliced off before softmax."""
    tokens = teacher.shared_tokens(student)
    return observation if tokens is None else observation.select(tokens)


def _on(device: torch.device, images: Tensor) -> Tensor:
    """uint8 [b, C, S, S] -> float32 in [0, 1], on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def predict(
    subjects: Sequence[Predictor],
    images: Split,
    device: torch.device,
    precision: str = "float32",
    workers: int = 0,
    among: NDArray[np.int64] | None = None,
) -> list[Predictions]:
    """Predictions of several subjects in one pass over the images.

    Each batch is loaded once, and each distinct teacher runs once for all who need it. Batches have a fixed size, so a
    subject's numbers do not depend on its company. ``workers``: processes that load images ahead of time, which change
    no number. ``among``: the classes that are chosen among, where they are not all: the logits of the others do not
    count, neither for the prediction nor for the probabilities.

    Raises ValueError for a copy-student without its teacher and for labels that are not ``among`` the classes, and what
    :meth:`atdiag.data.loader.Stream.batches` raises.
    """
    if among is not None and not np.isin(images.labels, among).all():
        raise ValueError("the labels of some images are not among the classes that predictions are made among")
    needed: dict[int, tuple[ViT | Foreign, list[Transfer]]] = {}
    for subject in subjects:
        subject.network.eval()
        if methods.needs_teacher_at_test(subject.transfer):
            if subject.teacher is None:
                blocks = subject.transfer.layers
                raise ValueError(f"a student that copies blocks {blocks} needs its teacher at test time, and has none")
            needed.setdefault(id(subject.teacher), (subject.teacher, []))[1].append(subject.transfer)
    said: list[list[tuple[NDArray[np.int32], NDArray[np.float32]]]] = [[] for _ in subjects]
    with (
        closing(loader.test_batches(images, BATCH, workers, pin=device.type == "cuda")) as batches,
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        for start, batch in zip(range(0, len(images), BATCH), batches, strict=True):
            pixels = _on(device, batch)
            shown = {
                key: teacher.observe(pixels, of_teacher(transfers)) for key, (teacher, transfers) in needed.items()
            }
            for subject, out in zip(subjects, said, strict=True):
                own = Observation()
                if subject.teacher is not None and id(subject.teacher) in shown:
                    own = fit(shown[id(subject.teacher)], subject.teacher, subject.network.network)
                    own = replace(own, averages=subject.averages)
                logits = methods.forward_test(subject.network, subject.transfer, pixels, own).float().cpu()
                out.append(_score(logits, images.labels[start : start + BATCH], among))
    return [_gather(out, images) for out in said]


def _score(
    logits: Tensor, labels: NDArray[np.int64], among: NDArray[np.int64] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Prediction and log-probability of the label of a batch."""
    if among is not None:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[torch.from_numpy(among)] = False
        logits = logits.masked_fill(others, -torch.inf)
    log_p = logits.log_softmax(-1).numpy()
    return log_p.argmax(-1).astype(np.int32), log_p[np.arange(len(labels)), labels].astype(np.float32)


def _gather(batches: list[tuple[NDArray[np.int32], NDArray[np.float32]]], images: Split) -> Predictions:
    return Predictions(
        prediction=np.concatenate([prediction for prediction, _ in batches]),
        label=images.labels.astype(np.int32),
        cluster=images.clusters.astype(np.int32),
        log_p=np.concatenate([log_p for _, log_p in batches]),
    )
