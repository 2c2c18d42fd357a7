"""Measure how long the divergence of all pairs of heads takes, and that its memory does not grow with the images.

    python -m benchmarks.similarity                         # a CPU: few images, small networks
    python -m benchmarks.similarity --device cuda           # ViT-B/16, 12 blocks x 12 heads, 10,000 images, one pass

Two networks with random weights are compared on random images, which do not affect the cost: Jensen-Shannon divergence
of every head with every head of the same block, and CKA of the residual streams. Memory is the allocator's peak above
both networks on CUDA, the peak resident size of the process on a CPU, where it is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atdiag.analysis.images import ImageSet
from atdiag.analysis.similarity import similarity
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import BATCH
from atdiag.core.spec import Network
from atdiag.networks.model import students
from atdiag.training import evaluation, steps
from atdiag.training.provenance import environment
from benchmarks.transfer_cost import GRIDS, SIZES

FLAT = 1.25
"""Ten times as many images may take this multiple of the memory at most.

nnsight leaves a batch's tensors in reference cycles, so that those of a few batches wait for Python's collector; with
more images they are not more.
"""


@dataclass(frozen=True)
class Noise:
    """Random images, the same few over and over."""

    pixels: NDArray[np.uint8]

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return an image, uint8 [C, S, S]."""
        image: NDArray[np.uint8] = self.pixels[index % len(self.pixels)]
        return image


def compare(network: Network, device: torch.device, count: int) -> tuple[float, float | None]:
    """Compare two networks on some images; return the seconds it takes and the MiB it needs (None: not known)."""
    one, other = (
        Subject(f"seed {seed}", evaluation.Predictor(body.eval().requires_grad_(False)), network)
        for seed, body in enumerate([students.build(network, 0), students.build(network, 1)])
    )
    one.to(device)
    other.to(device)
    size = (BATCH, network.channels, network.image_size, network.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    pictures = ImageSet(tuple(map(str, range(count))), Noise(pixels))
    before = 0
    if device.type == "cuda":
        similarity(one, other, ImageSet(pictures.names[:BATCH], Noise(pixels)))  # warm up
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    similarity(one, other, pictures)  # its result is on the CPU: nothing is left running
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    return seconds, steps.process_mib("VmHWM") if steps.MEMORY.exists() else None


def alone(asked: argparse.Namespace, count: int) -> tuple[float, float | None]:
    """Compare on a CPU in a process of its own, since the peak resident size of a process never falls."""
    line = [sys.executable, "-m", "benchmarks.similarity", "--size", asked.size, "--tokens", str(asked.tokens)]
    line += ["--depth", str(asked.depth), "--threads", str(torch.get_num_threads()), "--alone", str(count)]
    seconds, memory = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return seconds, memory


def main() -> None:
    """Measure, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=SIZES, help="default: ti on a CPU, b on CUDA")
    parser.add_argument("--tokens", type=int, default=197, choices=GRIDS)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--images", type=int, help="default: 640 on a CPU, 10,000 on CUDA; first a tenth")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    asked.size = asked.size or ("ti" if device.type == "cpu" else "b")
    width, heads = SIZES[asked.size]
    side = 16 * GRIDS[asked.tokens]
    network = Network(image_size=side, patch_size=16, width=width, depth=asked.depth, heads=heads, classes=10)
    if asked.alone:
        print(json.dumps(compare(network, device, asked.alone)))
        return
    images = asked.images or (640 if device.type == "cpu" else 10_000)
    cases = []
    for count in (max(BATCH, images // 10), max(BATCH, images)):
        seconds, memory = alone(asked, count) if device.type == "cpu" else compare(network, device, count)
        cases.append({"images": count, "seconds": seconds, "memory_mib": memory})
        told = "" if memory is None else f", {memory:,.0f} MiB"
        print(f"{count:6,} images: {seconds:7.1f} s, {count / seconds:7.0f} images/s{told}", flush=True)
    growth = None if cases[0]["memory_mib"] is None else cases[1]["memory_mib"] / cases[0]["memory_mib"]
    if growth is not None:
        print(f"{'met   ' if growth <= FLAT else 'MISSED'} memory grows {growth:.2f} times (target <= {FLAT:.2f})")
    document: dict[str, Any] = {
        "benchmark": "similarity",
        "machine": environment(device),
        "network": network.model_dump(mode="json"),
        "threads": torch.get_num_threads(),
        "cases": cases,
        "memory_growth": growth,
    }
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
