"""What a run was computed on: recorded, but not part of its hash."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from atdiag.core import resources
from atdiag.core.spec import Data
from atdiag.data import manifest

_PACKAGES = ("atdiag", "torch", "timm", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, threads, versions and time."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "versions": versions(),
        "finished_at": now(),
    }


def origin(data: Data, device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a run's provenance when a process starts or resumes it; any of it may change while the run trains.

    command: the command line that ordered the run; None for this process's own. Keys include ``git``, see
    :func:`git_state`, and ``data_manifest``, the sha256 of the manifest that ``atdiag data check`` wrote for a
    real-image data set (None if there is none, or if a file has changed since).
    """
    return {
        "started_at": now(),
        "command": list(sys.argv if command is None else command),
        "git": git_state(),
        "data_manifest": manifest.recorded(data.name),
        "hardware": hardware(device),
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache  # the code as imported by this process, even if another commit is checked out later
def git_state(folder: Path = Path(__file__).parents[2]) -> dict[str, Any] | None:
    """Return the commit of the checkout at ``folder``, and whether a tracked file has changes (``dirty``).

    None if atdiag is installed rather than run from a checkout, or if git is not available; then only :func:`versions`
    identifies the code.
    """
    if not (folder / ".git").exists():
        return None
    # GIT_DIR, as set in a hook, would name another repository; and a query must not lock the user's index.
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *question],
                env={**others, "GIT_OPTIONAL_LOCKS": "0"},
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            ).stdout
            for question in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the processor's name, the cores this process may use, the machine's memory, and the GPU if used."""
    memory = resources.memory()
    gib = None if memory is None else round(memory / 2**30, 1)
    out: dict[str, Any] = {"cpu": _cpu_name(), "cores": resources.available_cores(), "memory_gib": gib}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        out |= {"gpu": about.name, "gpu_memory_gib": round(about.total_memory / 2**30, 1)}
    return out


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def best_device() -> torch.device:
    """Return the best device that torch finds here: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Return a human-readable name of a device."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type
