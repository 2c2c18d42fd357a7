"""Estimate what a run costs, in floating-point operations and thread-seconds, before training. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from atdiag.core.runs import DamagedRunError, Store
from atdiag.core.spec import Network, RunSpec
from atdiag.data import sources

FLOPS_PER_SECOND = 50e9
"""Default FLOP/s of one CPU thread, until finished runs give a better value (measured on an idle server core of
2025)."""


_GPU_FLOPS_PER_SECOND = 50e12
"""Default FLOP/s of a GPU: a guess, not measured, until finished runs give a better value."""


_BLOCK = 90e6
"""Minimum cost of a block in a step, in floating-point operations, for launching its kernels (fitted to miniatures of
width 32 and 48; negligible for a ViT-S)."""


_PREDICTION = 32
"""Bytes of a test image's prediction."""

_RELATIVE = {"copy": 0.65, "distill": 0.95}
"""Cost of a method's step in all layers, relative to its operation count: a copy-student has no q and k to learn, and
one forward pass of the teacher serves a cohort (measured on 250 runs of miniatures)."""


def macs(network: Network) -> float:
    """Return the multiply-accumulates of one image's forward pass (blocks, patch embedding and head)."""
    n, c = network.tokens, network.width
    block = n * c * c * (4 + 2 * network.mlp_ratio) + 2 * n * n * c
    return network.depth * block + network.grid**2 * network.patch_size**2 * network.channels * c + c * network.classes


def seconds(spec: RunSpec, flops_per_second: float = FLOPS_PER_SECOND, tested: bool = True) -> float:
    """Estimate a run's thread-seconds: a step costs three forward passes of the student and one of the teacher.

    tested: include the test, and the validation after each epoch.
    """
    steps = spec.recipe.epochs * (spec.data.train // spec.recipe.batch_size)
    cost = steps * step_seconds(spec, spec.recipe.batch_size, flops_per_second)
    if not tested:
        return cost
    validated = spec.recipe.epochs * sources.find(spec.data).validation_images(spec.data)
    seen = validated + spec.probe_images
    return cost + seen * _prediction(spec) / flops_per_second + testing_seconds(spec, flops_per_second)


def step_seconds(spec: RunSpec, batch: int, flops_per_second: float = FLOPS_PER_SECOND) -> float:
    """Estimate the thread-seconds of a training step of so many images."""
    step = batch * (3 * 2 * macs(spec.network) + _of_teacher(spec)) + spec.network.depth * _BLOCK
    share = len(spec.transfer.layers or ()) / spec.network.depth
    relative = 1 - share * (1 - _RELATIVE.get(spec.transfer.method, 1.0))
    return step * relative / flops_per_second


def testing_seconds(spec: RunSpec, flops_per_second: float = FLOPS_PER_SECOND) -> float:
    """Estimate the thread-seconds of a run's test: a forward pass of the student, and of its teacher if it copies."""
    return sources.find(spec.data).test_images(spec.data) * _prediction(spec) / flops_per_second


def _prediction(spec: RunSpec) -> float:
    """Return the floating-point operations of predicting one image."""
    return 2 * macs(spec.network) + (_of_teacher(spec) if spec.transfer.method == "copy" else 0)


def _of_teacher(spec: RunSpec) -> float:
    """Return the floating-point operations of the teacher's part of a forward pass."""
    if spec.teacher is None or not spec.transfer.layers:
        return 0.0
    return 2 * macs(spec.teacher.network) * (max(spec.transfer.sources) + 1) / spec.teacher.network.depth


@dataclass(frozen=True)
class Activations:
    """Numbers that pass from a teacher to its student for each image, by both ways of counting (Li et al. 2024)."""

    as_maps: int
    """With maps [heads, tokens, tokens]."""
    as_qk: int
    """With the queries and keys that make them, 2 x [tokens, width]."""


def activations(spec: RunSpec) -> Activations:
    """Count the activations that pass in a training step for each image; both counts agree where no map passes.

    A tensor alone (q, k, v) and a block's output have [tokens, width], logits one number for each class. Counted are
    the student's tokens: registers that it lacks do not pass. Without a transfer nothing does.
    """
    transfer, student = spec.transfer, spec.network
    if spec.teacher is None or transfer.method == "none":
        return Activations(0, 0)
    if transfer.method == "logits":
        return Activations(student.classes, student.classes)
    n, teacher, layers = student.tokens, spec.teacher.network, len(transfer.layers)
    if transfer.method == "features":
        return Activations(layers * n * teacher.width, layers * n * teacher.width)
    chosen = transfer.different_heads if transfer.heads is None else len(transfer.heads)
    heads = teacher.heads if chosen is None else chosen
    one = layers * heads * n * (teacher.width // teacher.heads)
    return Activations(layers * heads * n * n, 2 * one) if transfer.tensor == "map" else Activations(one, one)


def parameters(network: Network) -> float:
    """Return about how many parameters a network has, to a percent or two: matrices, and their biases and norms."""
    c, hidden = network.width, network.width * network.mlp_ratio
    block = 4 * c * c + 2 * c * hidden + 4 * c + hidden + c + 4 * c
    patches = network.patch_size**2 * network.channels * c
    return network.depth * block + patches + network.tokens * c + c * network.classes


@dataclass(frozen=True)
class Disk:
    """Bytes that runs take on a disk: when they are finished, and in addition while all of them are in training."""

    finished: float
    training: float


def disk(specs: Iterable[RunSpec]) -> Disk:
    """Estimate the disk that runs take: weights and predictions, and a checkpoint with the optimiser's two moments."""
    finished = training = 0.0
    for spec in specs:
        weights = 4 * parameters(spec.network)
        finished += weights + _PREDICTION * sources.find(spec.data).test_images(spec.data)
        training += weights * (3 if spec.recipe.ema is None else 4)
    return Disk(finished, training)


def usual(device: str) -> float:
    """Return the FLOP/s of a training process on a device, where nothing was measured."""
    return FLOPS_PER_SECOND if device == "cpu" else _GPU_FLOPS_PER_SECOND


def measured_speed(store: Store, device: str, newest: int = 30, default: float | None = None) -> float:
    """Return the FLOP/s of a training process on this device: the newest finished runs' median, else a default.

    Of a run over several ranks, that of one of them. default: None for :func:`usual`.
    """
    found: list[float] = []
    for run in reversed(store.list()):
        if len(found) == newest:
            break
        # A damaged run, or one of a version that recorded less, is reported where it is used.
        with contextlib.suppress(DamagedRunError, FileNotFoundError, KeyError, TypeError):
            spec, result = run.spec, run.result()
            work = seconds(spec, 1.0, tested=False)
            long = work > FLOPS_PER_SECOND and result["seconds"] > 1  # a short run is mostly its start
            where = result["environment"]
            if long and where["device"].startswith(device):
                found.append(work / result["seconds"] / where.get("ranks", 1))
    return median(found) if len(found) > 2 else default if default is not None else usual(device)
