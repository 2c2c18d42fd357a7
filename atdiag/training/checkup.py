"""The checks of ``atdiag doctor``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from atdiag.core.spec import Data
from atdiag.data import sources
from atdiag.networks.registry import teachers
from atdiag.networks.weights import loading
from atdiag.training import compiled
from atdiag.training.provenance import best_device, device_name, versions
from atdiag.transfer import divergences, ops, sdpa
from atdiag.transfer.ops import QK

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    found: str
    ok: bool = True


def examine(runs: Path) -> list[Finding]:
    """Check versions, device, disk, embedded data, miniature teachers, and that both attention paths agree here."""
    device = best_device()
    return [
        Finding("versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
        Finding("device", f"{device_name(device)}, {torch.get_num_threads()} CPU threads"),
        _disk(runs),
        _data(),
        _miniatures(),
        *(_attention(device, tokens) for tokens in (26, 197)),
        _cross_entropy(device),
        _kernels(device),
        Finding("compiled blocks", _compiling(device)),
    ]


def _disk(runs: Path) -> Finding:
    folder = next(path for path in (runs.resolve(), *runs.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("disk", f"{free:.1f} GiB free for {runs}", ok=free > 1)


def _data() -> Finding:
    scenes = sources.find("digits").test_split(Data(name="digits", train=1, test_per_source=1))
    return Finding("data", f"digits and larger (embedded), {len(scenes)} held-out source digits")


def _miniatures() -> Finding:
    sound, bad = 0, []
    for name in teachers.miniatures():
        try:
            loading.load(loading.shipped(name))
            sound += 1
        except (OSError, ValueError, RuntimeError) as fault:
            bad.append(f"{name}: {fault}")
    return Finding("miniature teachers", "; ".join([f"{sound} load", *bad]), ok=not bad)


def _random(device: torch.device, tokens: int) -> tuple[QK, QK, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(2, 3, tokens, 64, generator=generator).to(device)

    return QK(draw(), draw(), 0.125), QK(draw(), draw(), 0.125), draw()


def _attention(device: torch.device, tokens: int) -> Finding:
    qk, _, v = _random(device, tokens)
    difference = (ops.attend(qk, v, explicit=True) - ops.attend(qk, v, explicit=False)).abs().max().item()
    path = "explicit" if ops.prefers_explicit(device, tokens) else "fused"
    text = f"largest difference {difference:.1e}; {path} is used on {device.type}"
    return Finding(f"fused and explicit attention, {tokens} tokens", text, ok=difference < _TOLERANCE)


def _cross_entropy(device: torch.device) -> Finding:
    teacher, student, _ = _random(device, 197)
    way = divergences.preferred(device)
    explicit, fused = (
        divergences.cross_entropy(teacher, student, way=one).item()
        for one in ("blocks", "sdpa" if way == "blocks" else way)
    )
    difference = abs(explicit - fused)
    text = f"difference {difference:.1e}; {way} on {device.type}"
    return Finding("fused and explicit distillation loss", text, ok=difference < _TOLERANCE)


def _kernels(device: torch.device) -> Finding:
    """Report which scaled dot-product attention kernels run here, without and with a teacher's position bias."""
    qk, _, v = _random(device, 197)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (x.to(dtype).requires_grad_() for x in (qk.q, qk.k, v))
    bias = torch.zeros(3, 197, 197, device=device, dtype=dtype)
    found = [sdpa.kernel(sdpa.attention(q, k, v, qk.scale, mask)) for mask in (None, bias)]
    plain, biased = (name or "none that saves memory" for name in found)
    text = f"{plain}; with a position bias {biased} ({str(dtype).removeprefix('torch.')})"
    return Finding("kernel of fused attention", text, ok=None not in found or device.type == "mps")


def _compiling(device: torch.device) -> str:
    state = "yes" if compiled.wanted(device) else "no"
    return f"{state} on {device.type} ({compiled.VARIABLE}=1 or 0 chooses)"
