"""Part 1: does the device compute what the CPU does, with the intended kernels and without synchronising?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atdiag.core.runs import Store
from atdiag.core.spec import Data, Network, Recipe, RunSpec, Seed, Transfer
from atdiag.core.spec.losses import MAP_LOSSES
from atdiag.data.loader import Batch, Stream
from atdiag.networks.model import students
from atdiag.networks.model.vit import ViT
from atdiag.networks.weights import loading
from atdiag.training import checkup, compiled, evaluation
from atdiag.training.determinism import float32_as_float32
from atdiag.training.trainer import RunTrainer
from atdiag.transfer import methods, sdpa
from atdiag.transfer.observation import Observation, of_teacher
from benchmarks.gpu.record import Record

FACTORS = {"float32": 10.0, "bfloat16": 2.0}
"""Maximum ratio of the device's error to the CPU's, both relative to float64 in the same type: rounding of the type is
not the device's fault, and sums in another order err a little more or less."""
LEAST = {"float32": 1e-5, "bfloat16": 1e-3}
"""A relative error that always passes: a single number, such as a loss, may be exact on the CPU by chance."""
KERNELS = ("flash", "cudnn")
"""The kernels intended for bf16 without a bias."""
STEPS = 20


def transfers(depth: int) -> dict[str, Transfer]:
    """Return copy, and distillation by every loss, of all blocks."""
    blocks = tuple(range(depth))
    losses = {f"distill {loss}": Transfer(method="distill", layers=blocks, loss=loss) for loss in MAP_LOSSES}
    return {"copy": Transfer(method="copy", layers=blocks), **losses}


def network(toy: bool) -> Network:
    """Return the description of two blocks of a ViT-Ti on 197 tokens."""
    shape = {"image_size": 32, "width": 48} if toy else {"image_size": 224, "width": 192}
    return Network(**shape, patch_size=16, depth=2, heads=3, classes=10)


def peaked(one: Network, seed: int) -> ViT:
    """Return a network whose maps are far from uniform: between uniform maps every loss is mere rounding."""
    vit = students.build(one, seed)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.q_weight.mul_(2)
            block.attn.k_weight.mul_(2)
    return vit


def step(one: Network, transfer: Transfer, device: torch.device, kind: str) -> dict[str, Tensor]:
    """Return logits, transfer loss and gradients of a training step, in float64 on the CPU."""
    dtype = torch.float64 if kind == "float64" else torch.float32
    student, teacher = (peaked(one, seed).to(device, dtype).eval() for seed in (0, 1))
    teacher.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, one.image_size, one.image_size, generator=generator).to(device, dtype)
    labels = (torch.arange(8) % 10).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bfloat16"):
        with torch.no_grad():
            shown = teacher.observe(images, of_teacher([transfer]))
        logits, extra = methods.forward(student, transfer, images, shown)
    loss = torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    (loss if extra is None else loss + extra).backward()
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    out = {"logits": logits, "gradients": torch.cat(gradients)}
    if extra is not None:
        out["transfer loss"] = extra
    return {name: value.detach().double().cpu() for name, value in out.items()}


def equal(record: Record, transfer: Transfer, kind: str) -> dict[str, Any]:
    """Return the relative errors (2-norm) of device and CPU from float64. Raises AssertionError if too large."""
    one, cpu = network(record.toy), torch.device("cpu")
    meant = step(one, transfer, cpu, "float64")
    found = {name: step(one, transfer, device, kind) for name, device in (("cpu", cpu), ("device", record.device))}
    far = {
        side: {name: ((values[name] - meant[name]).norm() / meant[name].norm()).item() for name in meant}
        for side, values in found.items()
    }
    bounds = {name: max(FACTORS[kind] * value, LEAST[kind]) for name, value in far["cpu"].items()}
    assert all(far["device"][name] <= bound for name, bound in bounds.items()), f"{far}, bounds {bounds}"
    return {"relative_difference_from_float64": far, "bounds": bounds}


def kernel(record: Record, tokens: int) -> dict[str, Any]:
    """Return which SDPA kernel runs, by type and with a bias. Raises AssertionError if none saves memory."""
    shape = (2, 3, tokens, 64)
    found: dict[str, str | None] = {}
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(shape, device=record.device, dtype=dtype, requires_grad=True) for _ in range(3))
        bias = torch.zeros(3, tokens, tokens, device=record.device, dtype=dtype)
        for text, mask in (("", None), (", bias", bias)):
            found[f"{str(dtype).removeprefix('torch.')}{text}"] = sdpa.kernel(sdpa.attention(q, k, v, 0.125, mask))
    assert None not in found.values(), f"SDPA's formula with N x N tensors ran: {found}"
    assert record.device.type != "cuda" or found["bfloat16"] in KERNELS, found
    return found


def specs(toy: bool, precision: str) -> list[RunSpec]:
    """Return scratch, copy and distillation from the miniature of DINOv2 with registers, on the embedded data."""
    source = loading.shipped("dinov2_reg_s")
    batch = 8 if toy else 64
    data = Data(train=batch * (3 if toy else STEPS), test_per_source=1, clutter=6)
    values = {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema": 0.9, "clip_grad": 1.0}
    recipe = Recipe(epochs=3, batch_size=batch, precision=precision, **values)
    blocks = tuple(range(source.network.depth))
    arms = [Transfer(), Transfer(method="copy", layers=blocks), Transfer(method="distill", layers=blocks)]
    return [
        RunSpec(
            network=source.network.student(components, classes=10),
            teacher=source,
            transfer=one,
            data=data,
            recipe=recipe,
            seed=Seed(data=0, model=0),
        )
        for one in arms
        for components in ([source.network.components] if toy else [(), source.network.components])
    ]


class Training:
    """Train runs side by side, step by step, without a cohort's evaluation and checkpoints."""

    def __init__(self, record: Record, folder: Path, compiler: str | None = None) -> None:
        self.device = record.device
        cuda = self.device.type == "cuda"
        self.specs = specs(record.toy, "bfloat16" if cuda else "float32")
        one = self.specs[0]
        self.stream = Stream(one.data, one.recipe, one.seed.data)
        source = next(spec.teacher for spec in self.specs if spec.teacher)
        self.teacher: ViT = loading.load(source).to(self.device)  # type: ignore[assignment]
        store, steps = Store(folder), self.stream.steps_per_epoch
        self.members = [
            RunTrainer(store.create(s), s, self.teacher if s.teacher else None, {}, steps, self.device)
            for s in self.specs
        ]
        if compiler is not None:
            for vit in (self.teacher, *(member.student for member in self.members)):
                compiled.compile_blocks(vit, compiler)
        self.batches: Iterator[Batch] = self.stream.batches(0, 3 * steps, 0, pin=cuda)

    def step(self) -> None:
        """Take one step of every run, like a cohort."""
        batch = next(self.batches).to(self.device)
        precision = self.specs[0].recipe.precision
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            shown = self.teacher.observe(batch.images, of_teacher(spec.transfer for spec in self.specs))
        for member in self.members:
            none = member.spec.transfer.method == "none"
            member.advance(batch, Observation() if none else evaluation.fit(shown, self.teacher, member.spec.network))


def no_synchronisation(record: Record) -> dict[str, Any]:
    """Train ``STEPS`` steps in which the host must not wait: CUDA raises an error if it would."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(record, Path(folder))
        for _ in range(1 if record.toy else 3):  # one-time work is done
            training.step()
        if record.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2 if record.toy else STEPS):
                training.step()
        finally:
            if record.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    record.needs_cuda("the steps ran, but torch.cuda.set_sync_debug_mode, which detects waiting, needs CUDA")
    return {"steps": STEPS, "runs_side_by_side": len(training.members), "synchronisations": 0}


def no_recompilation(record: Record) -> dict[str, Any]:
    """Return the graphs compiled by each epoch's end. Raises AssertionError for breaks, or new ones after the first."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(record, Path(folder), "eager" if record.toy else "inductor")
        graphs = []
        for _ in range(2 if record.toy else 3):
            for _ in range(training.stream.steps_per_epoch):
                training.step()
            graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    assert graphs[0] > 0, "nothing was compiled"
    assert breaks == 0, dict(counters["graph_break"])
    assert len(set(graphs)) == 1, f"graphs after each epoch: {graphs}"
    return {"graphs_after_each_epoch": graphs, "graph_breaks": breaks}


def doctor(record: Record) -> list[dict[str, Any]]:
    """Return the findings of ``atdiag doctor``. Raises AssertionError if a check fails."""
    found = [asdict(one) for one in checkup.examine(record.folder)]
    assert all(one["ok"] for one in found), found
    return found


def part(record: Record) -> None:
    """Measure all of part 1."""
    record.measure("doctor", partial(doctor, record))
    for kind in FACTORS:
        for name, transfer in transfers(2).items():
            with float32_as_float32():
                record.measure(f"equality, {name}, {kind}", partial(equal, record, transfer, kind))
    for tokens in (26, 65) if record.toy else (197, 577, 1370):
        record.measure(f"kernels, {tokens} tokens", partial(kernel, record, tokens))
    record.measure("no synchronisation", partial(no_synchronisation, record))
    record.measure("no recompilation", partial(no_recompilation, record))
