"""Find devices without importing torch, which takes seconds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shutil import which

from atdiag.core.errors import UserError, suggest
from atdiag.core.resources import available_cores

KNOWN = ("cuda", "mps", "cpu")
"""Devices by name, the best first."""


def named(wanted: str | None) -> str | None:
    """Return the name of a device, which need not be on this machine. Raises UserError for an unknown one."""
    if wanted is not None and wanted not in KNOWN:
        raise UserError(f"unknown device {wanted!r}{suggest(wanted, KNOWN)} (known: {', '.join(KNOWN)})")
    return wanted


def resolve(wanted: str | None) -> str:
    """Return the device to train on here: the requested one, or the best that seems to be on this machine.

    Raises UserError for an unknown device, and for one that is not on this machine.
    """
    if named(wanted) is None:
        return next(device for device in KNOWN if is_here(device))
    assert wanted is not None
    if not is_here(wanted):
        raise UserError(f"there is no {wanted} device on this machine", f"leave `device` out to use {resolve(None)}")
    return wanted


def is_here(device: str) -> bool:
    """Return whether a device seems to be on this machine."""
    if device == "cuda":
        nvidia = Path("/proc/driver/nvidia/gpus")
        found = (nvidia.is_dir() and any(nvidia.iterdir())) or (sys.platform == "win32" and bool(which("nvidia-smi")))
        return found and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    if device == "mps":
        return sys.platform == "darwin" and os.uname().machine == "arm64"
    return True


def processes_for(device: str, threads: int | None, ranks: int = 1) -> int:
    """Return how many training processes a device gets: one, or on a CPU as many as fit its cores.

    A process of several ranks counts once, and takes the cores of each.
    """
    if device != "cpu":
        return 1
    return max(1, available_cores() // ((threads or available_cores()) * ranks))


def fit_ranks(ranks: int, device: str) -> None:
    """Raise UserError if this machine has fewer devices than ranks. A CPU's cores may be shared by several."""
    have = {"cpu": ranks, "mps": 1, "cuda": _gpus()}[device]
    if ranks < 1 or ranks > have:
        raise UserError(
            f"`ranks` {ranks} on {device}: each needs a device of its own, and this machine has {have}",
            f"give 1 to {have}" if have > 1 else "leave `ranks` out",
        )


def _gpus() -> int:
    """Return how many GPUs this process may use, as far as can be told without CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() and not name.strip().startswith("-")])
    nvidia = Path("/proc/driver/nvidia/gpus")
    return sum(1 for _ in nvidia.iterdir()) if nvidia.is_dir() else 1
