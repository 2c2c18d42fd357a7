"""Predict the memory that a training step holds when its backward pass begins, without a GPU or any allocation.

    python benchmarks/predicted_memory.py --json benchmarks/results/predicted_memory.json

A step's forward pass runs on ``meta`` tensors, which have a shape and no memory. Counted are the distinct storages of
all tensors saved by autograd by then, and of those the step itself still holds (the teacher's observation; the maps, in
the straightforward formulation of ``transfer_cost.py``); parameters, images and optimiser state are left out.
Everything is in float32, and SDPA is a kernel that stores no map, as on CUDA. This is a prediction, not a measurement:
workspaces, gradients and temporary tensors come on top.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from benchmarks.transfer_cost import GRIDS, SIZES, STRAIGHT, TRANSFERS, straightforward
else:
    from transfer_cost import GRIDS, SIZES, STRAIGHT, TRANSFERS, straightforward

from atdiag.core.spec import Network, Transfer
from atdiag.networks.model.vit import ViT
from atdiag.training.provenance import versions
from atdiag.transfer import methods
from atdiag.transfer.observation import Observation, of_teacher
from atdiag.transfer.ops import QK

VARIANTS = ("plain", "copy", "distill ce", *STRAIGHT)


class _Saved:
    """A tensor saved by autograd, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an operation's own output would otherwise keep the graph alive forever


def kernel(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute SDPA by the kernel that stores no map: on ``meta``, torch uses the formula, which stores several."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = efficient(q, k, v, attn_mask, keep, scale=scale)[0]
    return out


def tensors(shown: Observation) -> Iterator[Tensor]:
    """Yield the tensors of a teacher's observation."""
    for record in shown.seen.values():
        assert isinstance(record.map, QK)
        yield from (x for x in (*record.map, record.v) if isinstance(x, Tensor))
    yield from shown.features.values()
    if shown.logits is not None:
        yield shown.logits


def mib(held: Iterable[Tensor], apart_from: Iterable[Tensor]) -> float:
    """Return the MiB of the distinct storages of some tensors, without those of others."""
    left_out = {x.untyped_storage()._cdata for x in apart_from}
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held}
    return sum(size for key, size in sizes.items() if key not in left_out) / 2**20


def held(network: Network, name: str, batch: int = 1) -> float:
    """Return the MiB that a step of a variant holds when its backward pass begins."""
    with torch.device("meta"):
        student, teacher = ViT(network), ViT(network).eval().requires_grad_(False)
        images = torch.empty(batch, network.channels, network.image_size, network.image_size)
        labels = torch.empty(batch, dtype=torch.int64)
    copies = name.endswith("copy")
    if copies:
        for block in student.blocks:
            for parameter in block.attn.unused_parameters().values():
                parameter.requires_grad_(False)
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        alive.add(saved := _Saved(tensor))
        return saved

    with (
        mock.patch.object(F, "scaled_dot_product_attention", kernel),
        mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # does not support meta
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor),
    ):
        if name in STRAIGHT:
            loss, own = _straight(student, teacher, images, labels, copies)
        else:
            loss, own = _ours(student, teacher, images, labels, TRANSFERS[name], network.depth)
        kept = [*(one.tensor for one in alive), *own]
        found = mib(kept, [*student.parameters(), *teacher.parameters(), images, labels])
        assert loss.requires_grad  # keeps the graph alive up to here
    return found


def _ours(
    student: ViT, teacher: ViT, images: Tensor, labels: Tensor, transfer: Transfer, depth: int
) -> tuple[Tensor, list[Tensor]]:
    if transfer.method != "none":
        transfer = transfer.model_copy(update={"layers": tuple(range(depth))})
    shown = Observation()
    if wanted := of_teacher([transfer]):
        with torch.no_grad():
            shown = teacher.observe(images, wanted)
    logits, extra = methods.forward(student, transfer, images, shown)
    loss = F.cross_entropy(logits, labels)
    return loss if extra is None else loss + extra, list(tensors(shown))


def _straight(student: ViT, teacher: ViT, images: Tensor, labels: Tensor, copies: bool) -> tuple[Tensor, list[Tensor]]:
    theirs: list[Tensor] = []
    own: list[Tensor] = []
    with torch.no_grad():
        straightforward(teacher, images, keep=theirs)
    logits = straightforward(student, images, keep=own, given=theirs if copies else None)
    loss = F.cross_entropy(logits, labels)
    if not copies:
        losses = [-(t * s.clamp_min(1e-12).log()).sum(-1).mean() for t, s in zip(theirs, own, strict=True)]
        loss = loss + 3.0 * torch.stack(losses).sum()
    return loss, [*theirs, *own]


def network(size: str, tokens: int, depth: int = 12) -> Network:
    """Return a plain ViT with patches of 16 pixels."""
    width, heads = SIZES[size]
    return Network(image_size=16 * GRIDS[tokens], patch_size=16, width=width, depth=depth, heads=heads, classes=1000)


def predict(size: str, tokens: int, depth: int = 12) -> dict[str, Any]:
    """Return the MiB per image of every variant, and the ratios for which there are targets."""
    each = {name: held(network(size, tokens, depth), name) for name in VARIANTS}
    ratios = {f"straight {kind} / {kind}": each[f"straight {kind}"] / each[kind] for kind in ("copy", "distill ce")}
    ratios["distill ce / plain"] = each["distill ce"] / each["plain"]
    return {"size": size, "tokens": tokens, "depth": depth, "mib_per_image": each, "ratios": ratios}


def main() -> None:
    """Predict, print, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", choices=SIZES)
    parser.add_argument("--tokens", type=int, nargs="+", choices=GRIDS, default=[197, 577, 1370])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    cases = [predict(asked.size, tokens, asked.depth) for tokens in asked.tokens]
    print(f"PREDICTED, not measured: ViT-{asked.size.upper()}, float32, MiB per image held when backward begins")
    print(f"{'tokens':>20} " + " ".join(f"{case['tokens']:>10,}" for case in cases))
    for name in VARIANTS:
        print(f"{name:>20} " + " ".join(f"{case['mib_per_image'][name]:>10,.0f}" for case in cases))
    for name in cases[0]["ratios"]:
        print(f"{name:>30} " + " ".join(f"{case['ratios'][name]:>8.2f}" for case in cases))
    if asked.json:
        document = {
            "benchmark": "predicted_memory",
            "kind": "predicted",
            "by": "saved tensors on meta; nothing was measured and no GPU was used",
            "precision": "float32",
            "versions": versions(),
            "cases": cases,
        }
        asked.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
