"""Measure the cost of tracing relative to a plain forward pass, and of comparing every pair of heads.

    python benchmarks/tracing.py [--model vit_small_patch16_224] [--batch 8] [--repeats 5] [--device cpu] [--json FILE]

The network has random weights: what it computes does not matter here. A forward pass with explicit attention forms the
same maps and throws them away; tracing runs the network as it is, fused, reads queries and keys by nnsight, and forms
each layer's map from them. Medians; the variants take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from atdiag.analysis import images, similarity, subjects, tracing

EXPLICIT, FUSED, TRACED, COMPARED = (
    "forward, explicit attention",
    "forward, fused attention",
    "all maps traced",
    "two networks compared, all heads",
)


def measure(model: str, batch: int, repeats: int, device: str) -> dict[str, float]:
    """Measure the seconds of each variant for one batch."""
    network = timm.create_model(model)
    subject = subjects.of(network, model).to(device)
    other = subjects.of(timm.create_model(model), "other").to(device)
    shape = (batch, subject.network.channels, subject.network.image_size, subject.network.image_size)
    pictures = images.from_arrays(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    (pixels,) = (one.pixels for one in pictures.batches(batch, device))
    want = tracing.request(subject)
    reader = tracing.Reader(subject)

    def traced() -> None:
        for layer in reader(pixels, want).layers.values():
            layer.tensor("map")

    def forward(fused: bool) -> None:
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        with torch.no_grad():
            subject.module(pixels)
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True

    def compared() -> None:
        similarity.similarity(subject, other, pictures, batch=batch)

    work: dict[str, Callable[[], None]] = {
        EXPLICIT: lambda: forward(fused=False),
        FUSED: lambda: forward(fused=True),
        TRACED: traced,
        COMPARED: compared,
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    with reader:
        for turn in range(repeats + 1):
            for name, run in work.items():
                _wait(device)
                begin = time.perf_counter()
                run()
                _wait(device)
                if turn:  # the first turn is a warm-up
                    times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        return next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    return platform.processor()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    found = measure(options.model, options.batch, options.repeats, options.device)
    for name, seconds in found.items():
        print(f"{name:36} {1000 * seconds:9.1f} ms  {seconds / found[EXPLICIT]:5.2f} x explicit")
    if options.json:
        document: dict[str, Any] = {
            "model": options.model,
            "batch": options.batch,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{_processor()}, 1 thread",
            "torch": torch.__version__,
            "seconds": found,
            "traced_over_explicit": found[TRACED] / found[EXPLICIT],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
