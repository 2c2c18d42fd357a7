"""Training steps on one random batch, alone and for each method, to measure their time and memory.

    python -m atdiag.training.steps < step.json     print the MiB that one step needs

A step is forward pass, loss, backward pass and AdamW, of the student and with the teacher's part; reading and
augmenting images is left out. Nothing here depends on the values of weights, so those of a published teacher need not
be on the machine.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from atdiag.core.spec import Network, Spec, Transfer
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.training import compiled, evaluation
from atdiag.transfer import methods
from atdiag.transfer.observation import Observation, of_teacher

Step = Callable[[], None]

_WARM = 2
"""Rounds that are not counted."""
MEMORY = Path("/proc/self/clear_refs")
"""Where Linux resets the peak of a process's memory; elsewhere it can't be measured on a CPU."""


class StepOf(Spec):
    """What one step trains: everything on which its time and memory depend but the machine."""

    network: Network
    """The student's."""
    teacher: Network | None = None
    transfer: Transfer = Transfer()
    batch: int

    def made(self, device: torch.device) -> Step:
        """Return the step as a function, on a batch of its own."""
        return Bench(self.teacher, self.network, self.batch, device).step(self.network, self.transfer)


class Bench:
    """A frozen teacher, random images and labels on a device: one batch for steps of every method."""

    def __init__(self, teacher: Network | None, network: Network, batch: int, device: torch.device) -> None:
        self.device = device
        self.teacher = None
        if teacher is not None:
            self.teacher = students.build(teacher, 1).to(device).eval().requires_grad_(False)
            self._compiled(self.teacher)
        generator = torch.Generator().manual_seed(0)
        shape = (batch, network.channels, network.image_size, network.image_size)
        self.images = torch.rand(shape, generator=generator).to(device)
        self.labels = torch.randint(network.classes, (batch,), generator=generator).to(device)

    def _compiled(self, vit: ViT) -> None:
        if compiled.wanted(self.device):
            compiled.compile_blocks(vit)

    def student(self, network: Network, transfer: Transfer) -> tuple[ViT, torch.optim.Optimizer]:
        """Return a student and its optimiser; parameters that the transfer leaves unused are not trained."""
        vit = students.build(network, 0).to(self.device).train()
        students.freeze_unused(vit, transfer)
        trained = [p for p in vit.parameters() if p.requires_grad]
        return vit, torch.optim.AdamW(trained, lr=1e-4, fused=self.device.type in ("cpu", "cuda"))

    def autocast(self) -> torch.autocast:
        """Return bf16 autocast on CUDA, disabled autocast elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def show(self, transfer: Transfer, student: Network) -> Observation:
        """Return what the teacher shows to a student of this batch; empty if it shows nothing."""
        wanted = of_teacher([transfer])
        if not wanted or self.teacher is None:
            return Observation()
        with torch.no_grad(), self.autocast():
            shown = evaluation.show(self.teacher, self.images, wanted)
            return evaluation.fit(shown, self.teacher, student, transfer)

    def step(self, network: Network, transfer: Transfer) -> Step:
        """Return one step of a method as a function."""
        vit, optimizer = self.student(network, transfer)
        self._compiled(vit)

        def step() -> None:
            shown = self.show(transfer, network)
            with self.autocast():
                logits, extra = methods.forward(vit, transfer, self.images, shown)
            self.update(logits, extra, optimizer)

        return step

    def update(self, logits: Tensor, extra: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
        """Do the backward pass of cross-entropy, and of a further loss if there is one, and the optimiser's step."""
        loss = F.cross_entropy(logits.float(), self.labels)
        (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def in_turns(
    steps: Mapping[str, Step], repeats: int, device: torch.device, on_round: Callable[[int], None] = lambda done: None
) -> dict[str, list[float]]:
    """Measure the seconds of each step in every one of ``repeats`` rounds, after some that warm up.

    In turns, so that a slow minute of the machine affects all of them, and the ratios of one round are paired.
    on_round: callback with the number of counted rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + _WARM):
        for name, step in steps.items():
            _wait(device)
            begin = time.perf_counter()
            step()
            _wait(device)
            if turn >= _WARM:
                found[name].append(time.perf_counter() - begin)
        on_round(max(0, turn + 1 - _WARM))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(step: Step, device: torch.device) -> float:
    """Return the MiB that a step needs beyond resident networks and, after a first step, optimiser state.

    By the allocator on CUDA; on a CPU by the resident size of this process, whose peak never falls: a process measures
    one step, on Linux.
    """
    step()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float((torch.cuda.max_memory_allocated() - before) / 2**20)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    MEMORY.write_text("5")  # reset the peak (man 5 proc)
    resident = process_mib("VmRSS")
    step()
    return process_mib("VmHWM") - resident


def process_mib(field: str) -> float:
    """Return MiB of this process: VmRSS for current memory, VmHWM for the peak. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory(one: StepOf, device: torch.device) -> float | None:
    """Measure :func:`peak` of a step, on a CPU in a process of its own; None where it can't be measured."""
    if device.type == "cuda":
        return peak(one.made(device), device)
    if device.type != "cpu" or not MEMORY.exists():
        return None
    line = [sys.executable, "-P", "-m", "atdiag.training.steps", str(torch.get_num_threads())]
    done = subprocess.run(line, input=one.model_dump_json(), capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print the memory of the step on standard input, on a CPU with as many threads as the argument says."""
    torch.set_num_threads(int(sys.argv[1]))
    one, device = StepOf.model_validate_json(sys.stdin.read()), torch.device("cpu")
    print(peak(one.made(device), device))


if __name__ == "__main__":
    main()
