"""Measure the cost of hooks relative to a plain forward pass, and peak memory over many images.

    python benchmarks/hooks.py [--model vit_small_patch16_224] [--batch 8] [--repeats 5] [--device cpu] [--json FILE]

The network has random weights: what it computes does not matter here. A forward pass with explicit attention forms the
same patterns and throws them away. Medians, on a CPU of the process's time; the variants
take turns. Memory
is the peak of a process of its own that averages all patterns over its images, batch by batch.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from tracing import _processor, _wait

from atdiag import hooked

EXPLICIT, FUSED, PATTERNS, EVERYTHING, EDITED, GRADIENTS = (
    "forward, explicit attention",
    "forward, fused attention",
    "run_with_cache, all patterns",
    "run_with_cache, all points",
    "run_with_hooks, all patterns edited",
    "run_with_cache, patterns and their gradients",
)
MOST = 1.3
"""The target for caching all patterns, in explicit forward passes."""
MOST_MEMORY = 1.1
"""The target for ten times as many images."""


def _patterns(name: str) -> bool:
    return name.endswith("hook_pattern")


def measure(name: str, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Measure the seconds of each variant for one batch."""
    network = timm.create_model(name).to(device).requires_grad_(False)
    model = hooked(network)
    config = model.cfg
    images = torch.rand(batch, config.n_channels, config.image_size, config.image_size, device=device)
    attention = [module for module in network.modules() if hasattr(module, "fused_attn")]

    @torch.no_grad()
    def forward(fused: bool) -> None:
        for module in attention:
            module.fused_attn = fused
        model.module(images)
        for module in attention:
            module.fused_attn = True

    def gradients() -> None:
        model.run_with_cache(images, _patterns, incl_bwd=True, metric=lambda logits: logits[:, 0].sum())

    plain = torch.no_grad()
    work: dict[str, Callable[[], Any]] = {
        EXPLICIT: lambda: forward(fused=False),
        FUSED: lambda: forward(fused=True),
        PATTERNS: plain(lambda: model.run_with_cache(images, _patterns)),
        EVERYTHING: plain(lambda: model.run_with_cache(images)),
        EDITED: plain(lambda: model.run_with_hooks(images, [(_patterns, lambda value, hook: value.mul_(1.0))])),
        GRADIENTS: gradients,
    }
    # On a CPU the process's own time: other programs on the machine then count little.
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {one: [] for one in work}
    for turn in range(repeats + 1):
        for one, run in work.items():
            _wait(device)
            begin = clock()
            run()
            _wait(device)
            if turn:  # the first turn is a warm-up
                times[one].append(clock() - begin)
    return {one: statistics.median(values) for one, values in times.items()}


@torch.no_grad()
def _stream(name: str, batch: int, count: int) -> float:
    """Average all patterns over some images, batch by batch; return the process's peak in MiB."""
    torch.set_num_threads(1)
    model = hooked(timm.create_model(name))
    config = model.cfg
    total: Any = 0
    for _ in range(count // batch):
        images = torch.rand(batch, config.n_channels, config.image_size, config.image_size)
        _, cache = model.run_with_cache(images, _patterns)
        total = total + torch.stack([value.sum(0) for value in cache.values()])
    # ru_maxrss would count what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) / 1024


def _peak(name: str, batch: int, count: int) -> float:
    command = [sys.executable, __file__, "--model", name, "--batch", str(batch), "--stream", str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.stream:
        print(_stream(options.model, options.batch, options.stream))
        return
    if options.device == "cpu":
        torch.set_num_threads(1)
    found = measure(options.model, options.batch, options.repeats, options.device)
    for name, seconds in found.items():
        print(f"{name:46} {1000 * seconds:9.1f} ms  {seconds / found[EXPLICIT]:5.2f} x explicit")
    few, many = (_peak(options.model, options.batch, options.batch * times) for times in (4, 40))
    print(f"peak memory, patterns of {4 * options.batch} images {few:.0f} MiB, of ten times as many {many:.0f} MiB")
    document: dict[str, Any] = {
        "model": options.model,
        "batch": options.batch,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{_processor()}, 1 thread",
        "torch": torch.__version__,
        "seconds": found,
        "patterns_over_explicit": found[PATTERNS] / found[EXPLICIT],
        "target": MOST,
        "peak_mib": {str(4 * options.batch): few, str(40 * options.batch): many},
        "memory_ratio": many / few,
        "memory_target": MOST_MEMORY,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
