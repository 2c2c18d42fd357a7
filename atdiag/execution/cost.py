"""Estimate what a run costs, in floating-point operations and thread-seconds, before training. Imports no torch."""

from __future__ import annotations

import contextlib
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
    step = spec.recipe.batch_size * (3 * 2 * macs(spec.network) + _of_teacher(spec)) + spec.network.depth * _BLOCK
    share = len(spec.transfer.layers or ()) / spec.network.depth
    relative = 1 - share * (1 - _RELATIVE.get(spec.transfer.method, 1.0))
    cost = steps * step * relative / flops_per_second
    if not tested:
        return cost
    validated = spec.recipe.epochs * sources.find(spec.data).validation_images(spec.data)
    seen = validated + spec.probe_images
    return cost + seen * _prediction(spec) / flops_per_second + testing_seconds(spec, flops_per_second)


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


WIDE = 768
"""Width of the networks for which the FLOP/s of a GPU were measured."""

GPUS = {"h100": 326e12, "h200": 354e12}
"""GPU -> FLOP/s of training a ViT-B there: batch 128, bfloat16, compiled, images already on the device
(``benchmarks/results/gpu``)."""


def gpu_speed(gpu: str, width: int) -> float:
    """Return the FLOP/s assumed of a GPU: as measured for a ViT-B, and in proportion less for narrower networks.

    That proportion is a guess, and so is that images come fast enough.
    """
    return GPUS[gpu] * min(1.0, width / WIDE)


def measured_speed(store: Store, device: str, newest: int = 30) -> float:
    """Return the FLOP/s of a training process on this device: the newest finished runs' median, or the default.

    Of a run over several ranks, that of one of them.
    """
    found = []
    for run in store.list()[-newest:]:
        # A damaged run, or one of a version that recorded less, is reported where it is used.
        with contextlib.suppress(DamagedRunError, FileNotFoundError, KeyError, TypeError):
            spec, result = run.spec, run.result()
            work = seconds(spec, 1.0, tested=False)
            long = work > FLOPS_PER_SECOND and result["seconds"] > 1  # a short run is mostly its start
            where = result["environment"]
            if long and where["device"].startswith(device):
                found.append(work / result["seconds"] / where.get("ranks", 1))
    usual = FLOPS_PER_SECOND if device == "cpu" else _GPU_FLOPS_PER_SECOND
    return median(found) if len(found) > 2 else usual
