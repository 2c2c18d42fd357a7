"""GPUs for estimates: how fast one trains a ViT in bfloat16, measured or assumed. Imports nothing heavy."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass

from atdiag.core.errors import UserError, suggest

WIDE = 768
"""Width of the networks for which the FLOP/s of a GPU were measured."""
_EFFICIENCY = 0.33
"""Share of the peak that training a ViT-B reaches, where it was not measured: the H100's."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    peak: float
    """Dense bfloat16 FLOP/s on the maker's data sheet, accumulated in float32."""
    memory_gib: int
    measured: float | None = None
    """FLOP/s of training a ViT-B there; None: not measured."""

    @property
    def flops_per_second(self) -> float:
        """FLOP/s of training a ViT-B: measured, or assumed from the peak."""
        return self.measured or self.peak * _EFFICIENCY

    @property
    def efficiency(self) -> float:
        """Share of the peak that training reaches, or is assumed to reach."""
        return self.flops_per_second / self.peak

    @property
    def origin(self) -> str:
        """``measured`` or ``assumed``."""
        return "measured" if self.measured else "assumed"


GPUS = {
    "h100": Gpu(989e12, 80, 326e12),
    "h200": Gpu(989e12, 141, 354e12),
    "b200": Gpu(2250e12, 180),
    "a100": Gpu(312e12, 80),
    "l40s": Gpu(362e12, 48),
    "a40": Gpu(150e12, 48),
    "a6000": Gpu(155e12, 48),
    "a10": Gpu(125e12, 24),
    "l4": Gpu(121e12, 24),
    "rtx4090": Gpu(165e12, 24),
    "rtx3090": Gpu(71e12, 24),
}
"""Measured: batch 128, bfloat16, compiled, images already on the device (``benchmarks/results/gpu``). The others: the
same share of the peak as on an H100."""

USUAL = "h100"
"""The GPU of an estimate at the profiles that need one, where none is named and none is here."""


def named(gpu: str) -> Gpu:
    """Return a GPU by name. Raises UserError for an unknown one."""
    if gpu not in GPUS:
        raise UserError(f"`gpu` {gpu!r} is not known{suggest(gpu, GPUS)}", f"known: {', '.join(GPUS)}")
    return GPUS[gpu]


def speed(gpu: str, width: int) -> float:
    """Return the FLOP/s assumed of a GPU: as for a ViT-B, and in proportion less for narrower networks.

    That proportion is a guess, and so is that images come fast enough.
    """
    return named(gpu).flops_per_second * min(1.0, width / WIDE)


def recognised(name: str) -> str | None:
    """Return the GPU of the table that a driver's name means; None if it is none of them.

    >>> recognised("NVIDIA H100 80GB HBM3"), recognised("NVIDIA RTX A6000"), recognised("NVIDIA GeForce RTX 4090")
    ('h100', 'a6000', 'rtx4090')
    >>> recognised("Tesla T4") is None, recognised("NVIDIA A100-SXM4-80GB"), recognised("NVIDIA L40S")
    (True, 'a100', 'l40s')
    """
    words = re.split(r"[^a-z0-9]+", name.lower().replace("geforce rtx ", "rtx"))
    return next((gpu for gpu in GPUS if gpu in words), None)


@functools.cache
def here() -> str | None:
    """Return the GPU of the table that is in this machine; None if there is none, or nothing tells."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = shown.stdout.splitlines()
    return recognised(names[0]) if shown.returncode == 0 and names else None
