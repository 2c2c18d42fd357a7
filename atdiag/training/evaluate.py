"""Measuring a subject on the test images: anything that gives logits, a copy-student together with its teacher."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atdiag.data.datasets import Split
from atdiag.networks.vit import ViT
from atdiag.runs import Run
from atdiag.spec import Teacher, Transfer
from atdiag.transfer import method
from atdiag.transfer.ops import QK

BATCH = 256


@dataclass
class Subject:
    """A network that can be evaluated or traced; one that copies, together with the teacher it needs at test time."""

    network: ViT
    transfer: Transfer = field(default_factory=Transfer)
    teacher: ViT | None = None


def load_subject(run: Run, load_teacher: Callable[[Teacher], ViT]) -> Subject:
    """A finished run's student, frozen, together with the teacher that it needs at test time, if it needs one."""
    from safetensors.torch import load_file

    spec = run.spec
    network = ViT(spec.network)
    network.load_state_dict(load_file(run.weights))
    teacher = None
    if method.layers_at_test(spec.transfer):
        assert spec.teacher is not None
        teacher = load_teacher(spec.teacher)
    return Subject(network.eval().requires_grad_(False), spec.transfer, teacher)


@dataclass(frozen=True)
class Predictions:
    """What a subject said of each test image, [n] each; ``log_p`` is the log-probability of the true label."""

    prediction: NDArray[np.int32]
    label: NDArray[np.int32]
    cluster: NDArray[np.int32]
    log_p: NDArray[np.float32]

    @property
    def top1(self) -> float:
        """Accuracy in per cent."""
        return float(100 * np.mean(self.prediction == self.label))

    def to_bytes(self) -> bytes:
        """As a NumPy archive."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: getattr(self, name) for name in self.__dataclass_fields__})
        return buffer.getvalue()


def fit_maps(maps: Mapping[int, QK], teacher: ViT, student: ViT) -> dict[int, QK]:
    """A teacher's maps on the student's tokens: registers that it lacks are sliced off before softmax."""
    tokens = teacher.shared_tokens(student.network)
    if tokens is None:
        return dict(maps)
    return {layer: qk.select(tokens.to(qk.q.device)) for layer, qk in maps.items()}


def predict(
    subjects: Sequence[Subject], images: Split, device: torch.device, precision: str = "float32"
) -> list[Predictions]:
    """Predictions of several subjects in one pass over the images.

    Each batch is loaded once, and each distinct teacher runs once for all who need it. Batches have a fixed size, so a
    subject's numbers do not depend on its company. Raises ValueError for a copy-student without its teacher.
    """
    needed: dict[int, tuple[ViT, set[int]]] = {}
    for subject in subjects:
        subject.network.eval()
        if layers := method.layers_at_test(subject.transfer):
            if subject.teacher is None:
                raise ValueError(f"a student that copies blocks {layers} needs its teacher at test time, and has none")
            needed.setdefault(id(subject.teacher), (subject.teacher, set()))[1].update(layers)
    logits: list[list[Tensor]] = [[] for _ in subjects]
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(images.batch(start, start + BATCH)).to(device).float().div_(255)
            maps = {key: teacher.maps(pixels, layers) for key, (teacher, layers) in needed.items()}
            for subject, out in zip(subjects, logits, strict=True):
                own = {}
                if subject.teacher is not None and id(subject.teacher) in maps:
                    own = fit_maps(maps[id(subject.teacher)], subject.teacher, subject.network)
                out.append(method.forward_test(subject.network, subject.transfer, pixels, own).float().cpu())
    return [_score(torch.cat(out), images) for out in logits]


def _score(logits: Tensor, images: Split) -> Predictions:
    log_p = logits.log_softmax(-1).numpy()
    return Predictions(
        prediction=log_p.argmax(-1).astype(np.int32),
        label=images.labels.astype(np.int32),
        cluster=images.clusters.astype(np.int32),
        log_p=log_p[np.arange(len(images)), images.labels].astype(np.float32),
    )
