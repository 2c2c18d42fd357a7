"""Evaluate subjects on test images: any network that returns logits, or a copy-student together with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
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
from atdiag.transfer import methods, ops, sizes
from atdiag.transfer.attention import indices
from atdiag.transfer.observation import CaptureRequest, Observation, of_teacher
from atdiag.transfer.ops import Averaged

__all__ = [
    "Predictions",
    "Predictor",
    "averages",
    "chosen_heads",
    "differing_heads",
    "fit",
    "load_subject",
    "predict",
    "show",
]

BATCH = 256

AVERAGED_IMAGES = 2048
"""Number of training images over which a teacher's map is averaged (``average="examples"``)."""

COMPARED_IMAGES = 64
"""Number of training images on which a teacher's heads are compared (``teacher_heads="different"``)."""

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
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """The teacher's block -> its heads that were chosen, for a student that takes those that differ most."""

    def given(self, shown: Observation) -> Observation:
        """Return what the teacher shows, as the student is given it. The student must have a teacher."""
        assert self.teacher is not None
        own = fit(shown, self.teacher, self.network.network, self.transfer, self.heads)
        return replace(own, averages=self.averages)


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
    heads = chosen_heads(spec, teacher, run)
    return Predictor(network, spec.transfer, teacher, averages(spec, teacher, heads=heads), heads)


def averages(
    spec: RunSpec,
    teacher: ViT | Foreign,
    images: Split | None = None,
    heads: Mapping[int, tuple[int, ...]] | None = None,
) -> dict[int, Averaged]:
    """Return the teacher's maps averaged over examples, by block; empty unless the run's transfer uses them.

    Averages over the run's first ``AVERAGED_IMAGES`` training images, without augmentation, and returns one map [H, N,
    N] for each block, the same for every image in training and at test. Such a map keeps what depends on position and
    nothing of an image's content. images: those training images, if already loaded. heads: as in :func:`fit`.
    """
    transfer = spec.transfer
    if transfer.average != "examples":
        return {}
    sums: dict[int, Tensor] = {}
    count = 0
    for pixels in _training_images(spec, teacher, images, AVERAGED_IMAGES):
        count += len(pixels)
        shown = show(teacher, pixels, CaptureRequest(maps=frozenset(transfer.sources)))
        for layer, seen in fit(shown, teacher, spec.network, transfer, heads).seen.items():
            chosen = seen.map
            if transfer.heads is not None:
                chosen = chosen.select_heads(indices(transfer.heads, pixels.device))
            total = ops.probabilities(chosen).sum(0, keepdim=True)
            sums[layer] = total if layer not in sums else sums[layer] + total
    return {layer: Averaged(total / count) for layer, total in sums.items()}


def chosen_heads(
    spec: RunSpec, teacher: ViT | Foreign, run: Run | None = None, images: Split | None = None
) -> dict[int, tuple[int, ...]]:
    """Return the heads of the teacher's blocks that differ most; empty unless the run's transfer takes them.

    By their mean divergence on the run's first ``COMPARED_IMAGES`` training images, without augmentation (see
    :func:`atdiag.transfer.sizes.most_different`). run: a finished one, whose record is read instead. images: as in
    :func:`averages`.
    """
    transfer = spec.transfer
    if transfer.teacher_heads != "different" and transfer.different_heads is None:
        return {}
    if run is not None and run.finished and (stored := run.result().get("teacher_heads")):
        return {int(block): tuple(heads) for block, heads in stored.items()}
    return differing_heads(teacher, spec.network, transfer, _training_images(spec, teacher, images, COMPARED_IMAGES))


def differing_heads(
    teacher: ViT | Foreign, student: Network, transfer: Transfer, batches: Iterable[Tensor]
) -> dict[int, tuple[int, ...]]:
    """Return the heads of a teacher's blocks that differ most on batches of images [b, C, S, S], as in show()."""
    sums: dict[int, Tensor] = {}
    count = 0
    for pixels in batches:
        count += len(pixels)
        shown = show(teacher, pixels, CaptureRequest(maps=frozenset(transfer.sources)))
        for block, seen in _on_shared_tokens(shown, teacher, student).seen.items():
            apart = len(pixels) * sizes.head_divergence(seen.qk)
            sums[block] = apart if block not in sums else sums[block] + apart
    wanted = transfer.different_heads or student.heads
    return {block: sizes.most_different(apart / count, wanted) for block, apart in sorted(sums.items())}


def _training_images(
    spec: RunSpec, teacher: ViT | Foreign, images: Split | None, most: int
) -> Generator[Tensor, None, None]:
    """Yield a run's first training images, without augmentation, on the teacher's device: float32 in [0, 1]."""
    images = sources.find(spec.data).train_split(spec.data, spec.seed.data) if images is None else images
    device = next(teacher.parameters()).device
    count = min(len(images), most)
    for start in range(0, count, BATCH):
        yield _on(device, torch.from_numpy(images.batch(start, min(start + BATCH, count))))


@torch.no_grad()
def show(teacher: ViT | Foreign, images: Tensor, wanted: CaptureRequest, keep: Tensor | None = None) -> Observation:
    """Return what a teacher shows of images [B, C, S, S] in [0, 1] as its student sees them.

    A teacher of another image size sees them resized (:func:`atdiag.transfer.sizes.seen_at`). keep: factors of its
    residual branches, [depth, 2, B, 1, 1] (the spec rejects them for a foreign network).
    """
    images = sizes.seen_at(images, teacher.network.image_size)
    if keep is None:
        shown: Observation = teacher.observe(images, wanted)
        return shown
    assert isinstance(teacher, ViT)
    return teacher.observe(images, wanted, keep=keep)


def fit(
    observation: Observation,
    teacher: ViT | Foreign,
    student: Network,
    transfer: Transfer | None = None,
    heads: Mapping[int, tuple[int, ...]] | None = None,
) -> Observation:
    """Bring what a teacher shows to its student's size: the one place where this is done.

    Registers that the student lacks are sliced off before softmax; maps of another number of heads or another grid are
    brought to the student's (:mod:`atdiag.transfer.sizes`). Where both have one size the observation itself is
    returned. heads: those that :func:`chosen_heads` returned. Raises ValueError for networks of two sizes without the
    transfer, which says how maps pass between them.
    """
    observation = _on_shared_tokens(observation, teacher, student)
    if transfer is None:
        own, theirs = student, teacher.network
        if (own.heads, own.grid) != (theirs.heads, theirs.grid):
            raise ValueError("teacher and student differ in heads or grid: the transfer says how maps pass")
        return observation
    if transfer.different_heads is not None:
        observation = replace(observation, heads=heads or {})
    fitting = sizes.fitting(transfer, student, teacher.network, teacher.mean.device, heads)
    if fitting is None:
        return observation
    blocks = [block for block in dict.fromkeys(transfer.sources) if block in observation.seen]
    return replace(observation, seen={block: fitting.record(block, observation.seen[block]) for block in blocks})


def _on_shared_tokens(observation: Observation, teacher: ViT | Foreign, student: Network) -> Observation:
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
    ensembles: Sequence[tuple[int, ...]] = (),
) -> list[Predictions]:
    """Predict with several subjects in one pass over the images.

    Each batch is loaded once, and each distinct teacher runs once for all students that need it. The batch size is
    fixed, so a subject's numbers do not depend on which others are evaluated with it, nor on the number of ranks: they
    take the batches in turn, and each gets the predictions on all images.

    ensembles: subjects, by their place, whose class probabilities are averaged; the predictions of each ensemble follow
    those of the subjects. workers: processes that load images in advance; they change no number. among: the classes to
    choose from, None for all; the logits of other classes count neither for the prediction nor for the probabilities.

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
    said: list[list[_Said]] = [[] for _ in (*subjects, *ensembles)]
    starts = range(ranks.index * BATCH, len(images), ranks.count * BATCH)
    with (
        closing(loader.test_batches(images, BATCH, workers, device.type == "cuda", starts)) as batches,
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        for start, batch in zip(starts, batches, strict=True):
            pixels = _on(device, batch)
            shown = {key: show(teacher, pixels, of_teacher(transfers)) for key, (teacher, transfers) in needed.items()}
            labels, every = images.labels[start : start + BATCH], []
            for subject, out in zip(subjects, said, strict=False):
                key = id(subject.teacher)
                own = subject.given(shown[key]) if key in shown else Observation()
                logits = methods.forward_test(subject.network, subject.transfer, pixels, own).float().cpu()
                every.append(_log_p(logits, among))
                out.append(_score(every[-1], labels))
            for places, out in zip(ensembles, said[len(subjects) :], strict=True):
                together = torch.stack([every[place] for place in places])
                out.append(_score(together.logsumexp(0) - math.log(len(places)), labels))
    whole = _in_turn(ranks.gathered(said))
    return [_gather(out, images) for out in whole]


def _in_turn(said: list[list[list[_Said]]]) -> list[list[_Said]]:
    """Return, for each subject, the batches that the ranks took in turn in the images' order."""
    return [
        [one for turn in zip_longest(*(rank[subject] for rank in said)) for one in turn if one is not None]
        for subject in range(len(said[0]))
    ]


def _log_p(logits: Tensor, among: NDArray[np.int64] | None) -> Tensor:
    """Return the log-probabilities of a batch's classes [b, classes]."""
    if among is not None:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[torch.from_numpy(among)] = False
        logits = logits.masked_fill(others, -torch.inf)
    return logits.log_softmax(-1)


def _score(log_p: Tensor, labels: NDArray[np.int64]) -> _Said:
    """Return a batch's predictions and the log-probability of each label."""
    found = log_p.numpy()
    return found.argmax(-1).astype(np.int32), found[np.arange(len(labels)), labels].astype(np.float32)


def _gather(batches: list[_Said], images: Split) -> Predictions:
    return Predictions(
        prediction=np.concatenate([prediction for prediction, _ in batches]),
        label=images.labels.astype(np.int32),
        cluster=images.clusters.astype(np.int32),
        log_p=np.concatenate([log_p for _, log_p in batches]),
    )
