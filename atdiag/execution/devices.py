"""Find devices without importing torch, which takes seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from shutil import which

from atdiag.core.errors import UserError, suggest
from atdiag.core.options import ExecutionOptions
from atdiag.core.resources import available_cores
from atdiag.core.text import count

KNOWN = ("cuda", "mps", "cpu")
"""Devices by name, the best first."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable for the GPUs that a process may use."""


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
        return found and os.environ.get(VISIBLE) != ""
    if device == "mps":
        return sys.platform == "darwin" and os.uname().machine == "arm64"
    return True


# --- several devices -----------------------------------------------------------------------------------------------


def visible(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the GPUs that this process may use, in CUDA's order and by CUDA's names: indices or UUIDs.

    As CUDA does, the list in the environment is read up to the first entry that names no device.
    """
    given = environment.get(VISIBLE)
    if given is None:
        return [str(index) for index in range(_gpus())]
    out: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-"):
            break
        out.append(name)
    return out


@cache
def _gpus() -> int:
    """Return, asking once, how many GPUs this machine shows: by ``nvidia-smi``, else by the driver's folder."""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        if shown.returncode == 0:
            return sum(line.startswith("GPU ") for line in shown.stdout.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        pass
    nvidia = Path("/proc/driver/nvidia/gpus")
    return sum(1 for _ in nvidia.iterdir()) if nvidia.is_dir() else 1


def wanted(devices: str) -> int | tuple[int, ...]:
    """Parse ``devices``: a number of them, or with a comma the indices of some. Raises UserError.

    >>> wanted("8"), wanted("0,2"), wanted("2,")
    (8, (0, 2), (2,))
    """
    text = devices.replace(" ", "")
    if re.fullmatch(r"\d{1,4}", text) and int(text):
        return int(text)
    if re.fullmatch(r"(\d{1,4},)+\d{0,4}", text):
        chosen = tuple(int(part) for part in text.split(",") if part)
        if len(set(chosen)) == len(chosen):
            return chosen
        raise UserError(f"`devices` {devices} names a device twice", f"give `devices` {_listed(chosen)}")
    raise UserError(
        f"`devices` {devices!r} names no devices", "give how many, as 8, or which, as 0,2 (2, is one alone)"
    )


def _listed(indices: tuple[int, ...]) -> str:
    distinct = dict.fromkeys(indices)
    return ",".join(map(str, distinct)) + ("," if len(distinct) == 1 else "")


def number(devices: str | None) -> int | None:
    """Return how many devices are asked for; None if nothing says. Raises UserError as :func:`wanted` does."""
    if devices is None:
        return None
    asked = wanted(devices)
    return asked if isinstance(asked, int) else len(asked)


def chosen(devices: str | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the visible GPUs to use, by CUDA's names. Raises UserError for one that is not there."""
    have = visible(environment)
    if devices is None:
        return have
    asked = wanted(devices)
    indices = range(asked) if isinstance(asked, int) else asked
    if max(indices) >= len(have):
        named = f" ({VISIBLE}={environment[VISIBLE]})" if VISIBLE in environment else ""
        which_ = f"0 to {len(have) - 1}" if len(have) > 1 else "device 0"
        raise UserError(
            f"`devices` {devices}: this machine shows {count(len(have), 'GPU')}{named}",
            f"leave `devices` out to use {'all' if len(have) > 1 else 'it'}, or choose of {which_}",
        )
    return [have[index] for index in indices]


def slots(options: ExecutionOptions) -> list[dict[str, str]]:
    """Return a place for each process that runs side by side: what its environment adds.

    On GPUs ``per_device`` on each chosen one, the first of every device before the second of any; a process of several
    ranks has as many devices. Raises UserError for a device that is not on this machine, and for more ranks than
    devices.
    """
    device = resolve(options.device)
    if device == "cuda":
        fit_ranks(options, device)
        names, ranks = chosen(options.devices), options.ranks
        groups = [names[start : start + ranks] for start in range(0, len(names) - ranks + 1, ranks)]
        return [{VISIBLE: ",".join(group)} for _ in range(_per(options)) for group in groups]
    if options.devices is not None:
        raise UserError(
            f"`devices` {options.devices} chooses GPUs, and these runs are trained on {device}",
            "leave it out; `per_device` N runs N processes side by side",
        )
    many = processes_for(device, options.threads, options.ranks) if options.per_device is None else _per(options)
    return [{}] * many


def _per(options: ExecutionOptions) -> int:
    if options.per_device is not None and options.per_device < 1:
        raise UserError(f"`per_device` {options.per_device}", "give 1 or more")
    return options.per_device or 1


def processes_for(device: str, threads: int | None, ranks: int = 1) -> int:
    """Return how many training processes a device gets: one, or on a CPU as many as fit its cores.

    A process of several ranks counts once, and takes the cores of each.
    """
    if device != "cpu":
        return 1
    return max(1, available_cores() // ((threads or available_cores()) * ranks))


def fit_ranks(options: ExecutionOptions, device: str) -> None:
    """Raise UserError if there are fewer devices than ranks. A CPU's cores may be shared by several."""
    ranks = options.ranks
    have = len(chosen(options.devices)) if device == "cuda" else 1 if device == "mps" else ranks
    if ranks < 1 or ranks > have:
        raise UserError(
            f"`ranks` {ranks} on {device}: each needs a device of its own, and this machine has {have}",
            f"give 1 to {have}" if have > 1 else "leave `ranks` out",
        )
