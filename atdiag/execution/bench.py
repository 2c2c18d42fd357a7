"""Speeds that ``atdiag doctor --bench`` measured, kept for plans. Imports nothing heavy before it measures."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from atdiag.core import paths
from atdiag.core.resources import small_file
from atdiag.core.runs import write_atomically
from atdiag.core.spec import Network
from atdiag.execution import cost

_SECONDS = 15.0
"""Duration of the measurement on a device, after steps that are not counted."""
_WARM = 5
"""Steps that are not counted: kernels are compiled and chosen."""
_BATCH = 128
_VIT_B = Network(image_size=224, patch_size=16, channels=3, width=768, depth=12, heads=12, classes=1000)
"""What is trained on a GPU: the network for which :mod:`atdiag.execution.gpus` has its figures."""


@dataclass(frozen=True)
class Speed:
    """A measured speed of training: FLOP/s of one process."""

    flops_per_second: float
    at: str


def _file() -> Path:
    return paths.cache() / "speeds.json"


def _all() -> dict[str, dict[str, object]]:
    try:
        found = json.loads(small_file(_file()))
    except (OSError, ValueError):  # not measured yet; a damaged file is measured again
        return {}
    return found if isinstance(found, dict) else {}


def _name(device: str) -> str:
    return f"{socket.gethostname()}/{device}"


def kept(device: str) -> float | None:
    """Return the FLOP/s that were measured for a device of this machine; None if none were."""
    found = _all().get(_name(device))
    value = found.get("flops_per_second") if isinstance(found, dict) else None
    return float(value) if isinstance(value, int | float) and value > 0 else None


def keep(device: str, flops_per_second: float) -> None:
    """Keep a measurement for plans. Raises OSError."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    every = {**_all(), _name(device): {"flops_per_second": round(flops_per_second), "at": now}}
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_file(), json.dumps(every, indent=1))


def measure(device: str, network: Network = _VIT_B, batch: int = _BATCH, seconds: float = _SECONDS) -> float:
    """Return the FLOP/s of training a network on random images that are on the device, in bfloat16 and compiled.

    The work of a step is counted as :func:`atdiag.execution.cost.seconds` counts it. A batch that
    does not fit is halved.
    """
    import torch

    while True:
        try:
            return _measured(device, network, batch, seconds)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def _measured(device: str, network: Network, batch: int, seconds: float) -> float:
    import torch
    from torch.nn import functional

    from atdiag.networks.model import students
    from atdiag.training import compiled

    student = students.build(network, 0).to(device).train()
    if compiled.wanted(torch.device(device)):
        compiled.compile_blocks(student)
    optimizer = torch.optim.AdamW(student.parameters(), fused=device in ("cpu", "cuda"))
    shape = (batch, network.channels, network.image_size, network.image_size)
    images, labels = torch.rand(shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            logits = student(images)
        functional.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(_WARM):
        step()
    wait()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step()
        wait()
        steps += 1
    return steps * batch * 3 * 2 * cost.macs(network) / (time.perf_counter() - begin)
