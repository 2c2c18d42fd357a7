"""What a run costs, in floating-point operations and thread-seconds, before it is trained. Needs no torch."""

from __future__ import annotations

import contextlib
from statistics import median

from atdiag.core.runs import DamagedRunError, Store
from atdiag.core.spec import Network, RunSpec
from atdiag.data import sources

FLOPS_PER_SECOND = 50e9
"""What one CPU thread does, until finished runs say better (measured on an idle server core of 2025)."""


_GPU_FLOPS_PER_SECOND = 50e12
"""A guess for a GPU (not measured), until finished runs say better."""


_BLOCK = 90e6
"""The least that a block costs in a step, as floating-point operations: its kernels have to be launched (fitted to
miniatures of width 32 and 48; nothing beside what a ViT-S costs)."""


_RELATIVE = {"copy": 0.65, "distill": 0.95}
"""What a method's step in all layers costs beside its operations: a student that copies has no q and k to learn, and
one forward pass of the teacher serves a cohort (measured on 250 runs of miniatures)."""


def macs(network: Network) -> float:
    """Multiply-accumulates of one image's forward pass (blocks, patch embedding and head)."""
    n, c = network.tokens, network.width
    block = n * c * c * (4 + 2 * network.mlp_ratio) + 2 * n * n * c
    return network.depth * block + network.grid**2 * network.patch_size**2 * network.channels * c + c * network.classes


def seconds(spec: RunSpec, flops_per_second: float = FLOPS_PER_SECOND, tested: bool = True) -> float:
    """Estimated thread-seconds of a run: a step costs three forward passes of the student and one of the teacher."""
    steps = spec.recipe.epochs * (spec.data.train // spec.recipe.batch_size)
    step = spec.recipe.batch_size * (3 * 2 * macs(spec.network) + _of_teacher(spec)) + spec.network.depth * _BLOCK
    share = len(spec.transfer.layers or ()) / spec.network.depth
    relative = 1 - share * (1 - _RELATIVE.get(spec.transfer.method, 1.0))
    cost = steps * step * relative / flops_per_second
    return cost + (testing_seconds(spec, flops_per_second) if tested else 0)


def testing_seconds(spec: RunSpec, flops_per_second: float = FLOPS_PER_SECOND) -> float:
    """Estimated thread-seconds of a run's test: a forward pass of the student, and of the teacher that it copies."""
    teacher = _of_teacher(spec) if spec.transfer.method == "copy" else 0
    return sources.find(spec.data).test_images(spec.data) * (2 * macs(spec.network) + teacher) / flops_per_second


def _of_teacher(spec: RunSpec) -> float:
    """Floating-point operations of the teacher's part of a forward pass."""
    if spec.teacher is None or not spec.transfer.layers:
        return 0.0
    return 2 * macs(spec.teacher.network) * (spec.transfer.layers[-1] + 1) / spec.teacher.network.depth


def measured_speed(store: Store, device: str, newest: int = 30) -> float:
    """FLOP/s of a training process on this device: the median of the newest finished runs, or a rule of thumb."""
    found = []
    for run in store.list()[-newest:]:
        # Whoever needs a run that is damaged, or of a version that recorded less, will hear of it.
        with contextlib.suppress(DamagedRunError, FileNotFoundError, KeyError, TypeError):
            spec, result = run.spec, run.result()
            if result["seconds"] > 1 and result["environment"]["device"].startswith(device):
                found.append(seconds(spec, 1.0, tested=False) / result["seconds"])
    usual = FLOPS_PER_SECOND if device == "cpu" else _GPU_FLOPS_PER_SECOND
    return median(found) if len(found) > 2 else usual
