"""Measure the cost of attention transfer relative to plain training: a step's time and memory by method, loss, length.

    python benchmarks/transfer_cost.py                     # this machine's CPU: ViT-S, 197 to 1,370 tokens
    python benchmarks/transfer_cost.py --device cuda       # ViT-B/16, batch 128, bf16, compiled

All variants run in one process, in turns, and the medians of their times are compared, so that a slow minute of the
machine affects all of them. ``straight`` is the straightforward formulation, written out below: maps of all layers are
built as [B, H, N, N] tensors and kept until the loss. Memory is what a step needs above the resident networks: the
allocator's peak on CUDA; on a CPU the peak resident size of a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atdiag.core.spec import Network, Transfer
from atdiag.networks.model.vit import ViT
from atdiag.reports import writers
from atdiag.training import compiled, steps
from atdiag.training.provenance import environment
from atdiag.training.steps import Bench, Step

SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
GRIDS = {65: 8, 197: 14, 577: 24, 1370: 37}
LOSSES = ("ce", "mse", "jsd", "l1", "logits_mse")
TRANSFERS: dict[str, Transfer] = {
    "plain": Transfer(),
    "copy": Transfer(method="copy", layers=tuple(range(12))),
    **{f"distill {loss}": Transfer(method="distill", layers=tuple(range(12)), loss=loss) for loss in LOSSES},
}
STRAIGHT = ("straight copy", "straight distill ce")
TARGETS = {
    "cpu": {"copy": 1.05, "distill ce": 1.25, "straight time": 1.0, "straight memory": {1370: 2.0}},
    "cuda": {
        "copy": 1.00,
        "distill ce": 1.12,
        "memory": {197: 1.10, 1370: 1.15},
        "straight time": 1.5,
        "straight memory": {197: 3.0, 1370: 10.0},
    },
}


class Case:
    """A network size, a number of tokens and a batch, on a device."""

    def __init__(self, size: str, tokens: int, batch: int, depth: int, device: torch.device) -> None:
        self.size, self.tokens, self.batch, self.depth, self.device = size, tokens, batch, depth, device
        width, heads = SIZES[size]
        self.network = Network(
            image_size=16 * GRIDS[tokens], patch_size=16, width=width, depth=depth, heads=heads, classes=1000
        )
        self.bench = Bench(self.network, self.network, batch, device)

    def transfer(self, name: str) -> Transfer:
        """Return the transfer of a variant, on all layers."""
        found = TRANSFERS[name]
        return found if found.method == "none" else found.model_copy(update={"layers": tuple(range(self.depth))})

    def variant(self, name: str) -> Step:
        """Return one step of a variant as a function."""
        if name == "teacher":
            return lambda: self.bench.show(self.transfer("copy"), self.network) and None
        if name in STRAIGHT:
            return self._straight(name.endswith("copy"))
        return self.bench.step(self.network, self.transfer(name))

    def _straight(self, copy: bool) -> Step:
        """Return a step that builds all layers' maps as tensors: the teacher's are used, or compared with its own."""
        bench = self.bench
        vit, optimizer = bench.student(self.network, self.transfer("copy" if copy else "plain"))
        teacher = bench.teacher
        assert teacher is not None

        def step() -> None:
            theirs: list[Tensor] = []
            own: list[Tensor] = []
            with torch.no_grad(), bench.autocast():
                straightforward(teacher, bench.images, keep=theirs)
            with bench.autocast():
                logits = straightforward(vit, bench.images, keep=own, given=theirs if copy else None)
            losses = [-(t * s.clamp_min(1e-12).log()).sum(-1).mean() for t, s in zip(theirs, own, strict=True)]
            bench.update(logits, None if copy else 3.0 * torch.stack(losses).sum(), optimizer)

        return step


def straightforward(vit: ViT, images: Tensor, keep: list[Tensor], given: list[Tensor] | None = None) -> Tensor:
    """Run a forward pass that builds, uses and keeps every map [B, H, N, N] in float32."""
    x = vit.embed(images)
    for i, block in enumerate(vit.blocks):
        attn, z = block.attn, block.norm1(x)
        batch, tokens, width = z.shape
        if given is None:
            q, k, v = attn._heads(z, "qkv")
            p = ((attn.scale * q) @ k.transpose(-2, -1)).float().softmax(-1)
        else:
            (v,) = attn._heads(z, "v")
            p = given[i]
        keep.append(p)
        x = x + attn.proj((p.to(v.dtype) @ v).transpose(1, 2).reshape(batch, tokens, width))
        x = x + block.mlp(block.norm2(x))
    logits: Tensor = vit.forward_head(vit.norm(x))
    return logits


def times(case: Case, names: list[str], repeats: int) -> dict[str, float]:
    """Measure the median seconds of a step of each variant, in turns."""
    found = steps.in_turns({name: case.variant(name) for name in names}, repeats, case.device)
    return {name: statistics.median(values) for name, values in found.items()}


def fitting(case: Case, names: list[str]) -> list[str]:
    """Return the variants whose step fits on the device, each tried alone."""
    out = []
    for name in names:
        with contextlib.suppress(torch.OutOfMemoryError):
            peak_of(case, name)
            out.append(name)
        torch.cuda.empty_cache()  # does nothing without CUDA
    return out


def peak_of(case: Case, name: str) -> float:
    """Measure a variant's peak, on a CPU in a separate process, since the peak resident size never falls."""
    if case.device.type == "cuda":
        return steps.peak(case.variant(name), case.device)
    options = [
        "--size",
        case.size,
        "--tokens",
        str(case.tokens),
        "--batch",
        str(case.batch),
        "--depth",
        str(case.depth),
    ]
    line = [sys.executable, __file__, *options, "--threads", str(torch.get_num_threads()), "--peak", name]
    return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


def ratios(time_s: dict[str, float], memory: dict[str, float]) -> dict[str, float]:
    """Return the ratios that have targets."""
    out = {}
    bound = time_s["plain"] + time_s["teacher"]
    for name in time_s:
        if name.startswith(("copy", "distill")):
            out[f"time, {name} / (plain + teacher)"] = time_s[name] / bound
    for kind in ("copy", "distill ce"):
        if f"straight {kind}" not in time_s:
            continue  # it did not fit
        out[f"time, straight {kind} / {kind}"] = time_s[f"straight {kind}"] / time_s[kind]
        if memory:
            out[f"memory, straight {kind} / {kind}"] = memory[f"straight {kind}"] / memory[kind]
    if memory:
        out["memory, distill ce / plain"] = memory["distill ce"] / memory["plain"]
    return out


def main() -> None:
    """Measure, print a table of ratios, and write JSON and a plot if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=SIZES, help="default: s on a CPU, b on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", choices=GRIDS, default=[197, 577, 1370])
    parser.add_argument("--batch", type=int, help="images; default on a CPU: what 800 tokens hold, on CUDA 128 at 197")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", nargs="?", const=Path("-"), help="write it (-: print it)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="memory against tokens, as a figure")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    size = asked.size or ("s" if asked.device == "cpu" else "b")

    def case(tokens: int) -> Case:
        batch = asked.batch or (max(1, 800 // tokens) if asked.device == "cpu" else max(4, 128 * 197 // tokens))
        return Case(size, tokens, batch, asked.depth, device)

    if asked.peak:
        print(steps.peak(case(asked.tokens[0]).variant(asked.peak), device))
        return
    names = ["plain", "teacher", *(name for name in TRANSFERS if name != "plain"), *STRAIGHT]
    measured: list[dict[str, Any]] = []
    for tokens in asked.tokens:
        one = case(tokens)
        fit = fitting(one, names) if asked.device == "cuda" else names
        seconds = times(one, fit, asked.repeats)
        memory = {} if asked.no_memory else {name: peak_of(one, name) for name in fit}
        found = ratios(seconds, memory)
        measured.append(
            {"size": size, "tokens": tokens, "batch": one.batch, "depth": one.depth, "seconds": seconds}
            | {"memory_mib": memory, "ratios": found, "out_of_memory": [name for name in names if name not in fit]}
        )
        show(measured[-1], asked.device)
    document = {
        "benchmark": "transfer_cost",
        "machine": {**environment(device), "compiled": compiled.wanted(device)},
        "precision": "bfloat16" if asked.device == "cuda" else "float32",
        "repeats": asked.repeats,
        "cases": measured,
    }
    if asked.json == Path("-"):
        print(json.dumps(document))
    elif asked.json:
        asked.json.write_text(json.dumps(document, indent=1) + "\n")
    if asked.plot:
        plot(document, asked.plot)


def show(case: dict[str, Any], device: str) -> None:
    """Print one case as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"ViT-{case['size'].upper()}, {case['tokens']} tokens, batch {case['batch']}, {case['depth']} blocks",
        title_justify="left",
    )
    for column in ("step", "ms", "/ (plain + teacher)", "MiB above resident"):
        table.add_column(column, justify="left" if column == "step" else "right")
    bound = case["seconds"]["plain"] + case["seconds"]["teacher"]
    for name, seconds in case["seconds"].items():
        ratio = "" if name in ("plain", "teacher") else f"{seconds / bound:.2f}"
        memory = f"{case['memory_mib'][name]:.0f}" if case["memory_mib"] else ""
        table.add_row(name, f"{1000 * seconds:.0f}", ratio, memory)
    console = Console()
    console.print(table)
    targets = TARGETS[device]
    wanted: list[tuple[str, float, bool]] = []  # ratio, bound, whether it is an upper bound
    for kind in ("copy", "distill ce"):
        wanted.append((f"time, {kind} / (plain + teacher)", targets[kind], True))
        wanted.append((f"time, straight {kind} / {kind}", targets["straight time"], False))
        if case["tokens"] in targets["straight memory"]:
            wanted.append((f"memory, straight {kind} / {kind}", targets["straight memory"][case["tokens"]], False))
    if case["tokens"] in targets.get("memory", {}):
        wanted.append(("memory, distill ce / plain", targets["memory"][case["tokens"]], True))
    for name, bound, upper in wanted:
        if (value := case["ratios"].get(name)) is not None:
            met = value <= bound if upper else value >= bound
            console.print(
                f"{'met   ' if met else 'MISSED'} {name}: {value:.2f} (target {'<=' if upper else '>='} {bound:.2f})"
            )


def plot(document: dict[str, Any], path: Path) -> None:
    """Plot a step's memory against tokens."""
    from figures import style

    lines = {
        "plain": (style.GREY, "o-"),
        "copy": (style.BLUE, "s-"),
        "distill ce": (style.GREEN, "D-"),
        "straight copy": (style.ORANGE, "^--"),
        "straight distill ce": (style.VERMILLION, "v--"),
    }
    cases = document["cases"]
    tokens = [case["tokens"] for case in cases]
    with style.settings():
        figure, axes = style.canvas(2.0)
        for name, (colour, form) in lines.items():
            need = [case["memory_mib"][name] / case["batch"] for case in cases]
            label = name.replace("straight ", "straightforward ")
            axes.plot(tokens, need, form, color=colour, label=label, markersize=3)
        axes.set(xlabel="tokens", ylabel="MiB per image", xscale="log", yscale="log")
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.minorticks_off()
        title = f"memory of a step above the resident networks, ViT-{cases[0]['size'].upper()}"
        style.finish(figure, title, axes.get_legend_handles_labels()[0], "both axes are logarithmic")
        path.write_bytes(writers.draw(figure, path.suffix.removeprefix(".")))


if __name__ == "__main__":
    main()
