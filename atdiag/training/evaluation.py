"""Evaluate subjects on test images: any network that returns logits, or a copy-student together with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.core.runs import DamagedRunError, Run
from atdiag.core.spec import Network, RunSpec, Teacher, Transfer
from atdiag.data import loader, sources
from atdiag.data.splits import Split
from atdiag.networks.model.vit import ViT
from atdiag.networks.timm.wrapping import Foreign
from atdiag.networks.weights import files
from atdiag.networks.weights.sources import WeightsError
from atdiag.training.predictions import Predictions
from atdiag.training.ranks import ALONE, RankGroup
from atdiag.transfer import methods, ops
from atdiag.transfer.attention import indices
from atdiag.transfer.observation import CaptureRequest, Observation, of_teacher
from atdiag.transfer.ops import Averaged

__all__ = ["Predictions", "Predictor", "averages", "fit", "load_subject", "predict"]

BATCH = 256

AVERAGED_IMAGES = 2048
"""Number of training images over which a teacher's map is averaged (``average="examples"``)."""

_Said = tuple[NDArray[np.int32], NDArray[np.float32]]
"""A batch's predictions, and the log-probability of each label."""


@dataclass
class Predictor:
    """A network that can be evaluated or traced; a copy-student comes with the teacher that it needs at test time."""

    network: ViT
    transfer: Transfer = field(default_factory=Transfer)
    teacher: ViT | Foreign | None = None
    averages: Mapping[int, Averaged] = field(default_factory=dict)
    """Block -> the teacher's map averaged over examples, for a student that copies such averages."""


def load_subject(run: Run, load_teacher: Callable[[Teacher], ViT | Foreign]) -> Predictor:
    """Load a finished run's student, frozen, with its teacher if it needs one at test time.

    Raises DamagedRunError if the run's weights can't be read or differ from those recorded in its result.
    """
    spec = run.spec
    network = ViT(spec.network)
    run.sound(run.weights)
    try:
        network.load_state_dict(files.tensors(run.weights))
    except (WeightsError, OSError, RuntimeError) as fault:  # RuntimeError: weights of a different network
        raise DamagedRunError(run.weights, fault) from None
    network.eval().requires_grad_(False)
    if not methods.needs_teacher_at_test(spec.transfer):
        return Predictor(network, spec.transfer)
    assert spec.teacher is not None
    teacher = load_teacher(spec.teacher)
    return Predictor(network, spec.transfer, teacher, averages(spec, teacher))


def averages(spec: RunSpec, teacher: ViT | Foreign, images: Split | None = None) -> dict[int, Averaged]:
    """Return the teacher's maps averaged over examples, by block; empty unless the run's transfer uses them.

    Averages over the run's first ``AVERAGED_IMAGES`` training images, without augmentation, and returns one map [H, N,
    N] for each block, the same for every image in training and at test. Such a map keeps what depends on position and
    nothing of an image's content. images: those training images, if already loaded.
    """
    transfer = spec.transfer
    if transfer.average != "examples":
        return {}
    images = sources.find(spec.data).train_split(spec.data, spec.seed.data) if images is None else images
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


class SharedAverages:
    """The teacher's maps averaged over examples, computed once for all runs of a cohort that use the same ones."""

    def __init__(self, teacher: ViT | Foreign | None, images: Split | None) -> None:
        self.teacher, self.images = teacher, images
        self.made: dict[Hashable, dict[int, Averaged]] = {}

    def of(self, spec: RunSpec) -> dict[int, Averaged]:
        """Return a run's averages, empty if it uses none. Raises ValueError if teacher and student do not fit."""
        transfer = spec.transfer
        if self.teacher is None or transfer.average != "examples":
            return {}
        tokens = self.teacher.network.tokens_shared_with(spec.network)
        key = transfer.sources, transfer.heads, tokens  # all that the averages depend on within a cohort
        if key not in self.made:
            self.made[key] = averages(spec, self.teacher, self.images)
        return self.made[key]


def fit(observation: Observation, teacher: ViT | Foreign, student: Network) -> Observation:
    """Restrict a teacher's observation to the student's tokens: extra registers are sliced off before softmax."""
    tokens = teacher.shared_tokens(student)
    return observation if tokens is None else observation.select(tokens)


def _on(device: torch.device, images: Tensor) -> Tensor:
    """Convert uint8 [b, C, S, S] to float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def predict(
    subjects: Sequence[Predictor],
    images: Split,
    device: torch.device,
    precision: str = "float32",
    workers: int = 0,
    among: NDArray[np.int64] | None = None,
    ranks: RankGroup = ALONE,
) -> list[Predictions]:
    """Predict with several subjects in one pass over the images.

    Each batch is loaded once, and each distinct teacher runs once for all students that need it. The batch size is
    fixed, so a subject's numbers do not depend on which others are evaluated with it, nor on the number of ranks: they
    take the batches in turn, and each gets the predictions on all images.

    workers: processes that load images in advance; they change no number. among: the classes to choose from, None for
    all; the logits of other classes count neither for the prediction nor for the probabilities.

    Raises ValueError for a copy-student without its teacher, for labels that are not ``among`` the classes, and
    whatever :meth:`atdiag.data.loader.Stream.batches` raises.
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
    said: list[list[_Said]] = [[] for _ in subjects]
    starts = range(ranks.index * BATCH, len(images), ranks.count * BATCH)
    with (
        closing(loader.test_batches(images, BATCH, workers, device.type == "cuda", starts)) as batches,
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        for start, batch in zip(starts, batches, strict=True):
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
    whole = _in_turn(ranks.gathered(said))
    return [_gather(out, images) for out in whole]


def _in_turn(said: list[list[list[_Said]]]) -> list[list[_Said]]:
    """Return, for each subject, the batches that the ranks took in turn in the images' order."""
    return [
        [one for turn in zip_longest(*(rank[subject] for rank in said)) for one in turn if one is not None]
        for subject in range(len(said[0]))
    ]


def _score(logits: Tensor, labels: NDArray[np.int64], among: NDArray[np.int64] | None) -> _Said:
    """Return a batch's predictions and the log-probability of each label."""
    if among is not None:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[torch.from_numpy(among)] = False
        logits = logits.masked_fill(others, -torch.inf)
    log_p = logits.log_softmax(-1).numpy()
    return log_p.argmax(-1).astype(np.int32), log_p[np.arange(len(labels)), labels].astype(np.float32)


def _gather(batches: list[_Said], images: Split) -> Predictions:
    return Predictions(
        prediction=np.concatenate([prediction for prediction, _ in batches]),
        label=images.labels.astype(np.int32),
        cluster=images.clusters.astype(np.int32),
        log_p=np.concatenate([log_p for _, log_p in batches]),
    )
