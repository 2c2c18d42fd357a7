"""Trace many images batch by batch: keep everything, the mean, or any reduction.

>>> from atdiag.analysis import images, streaming, subjects
>>> from atdiag.core.spec import Data
>>> teacher = subjects.find("deit_s")
>>> pictures = images.choose(4, Data(name="digits", train=1, clutter=6), teacher.network)
>>> found = streaming.trace(teacher, pictures, what=("map", "residual"), layers=(0, 11))
>>> found["map", 11].shape, found["residual", 0].shape
(torch.Size([4, 2, 26, 26]), torch.Size([4, 26, 32]))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from atdiag.analysis.images import ImageSet
from atdiag.analysis.subjects import Subject
from atdiag.analysis.tracing import WHAT, Reader, Traced, TraceRequest, What, batch_size, check_images, request
from atdiag.core.errors import UserError


def stream(
    traces: Sequence[tuple[Subject, TraceRequest]], pictures: ImageSet, batch: int | None = None
) -> Iterator[tuple[Traced, ...]]:
    """Trace several subjects side by side on the same images; yield one :class:`Traced` for each, batch by batch.

    Keeps nothing from one batch to the next. All subjects must be on one device and take images of the same format.
    """
    check_images([subject for subject, _ in traces])
    networks = [subject.network for subject, _ in traces]
    device = traces[0][0].device
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(subject)) for subject, _ in traces]
        for one in pictures.batches(batch or batch_size(*networks), device):
            yield tuple(
                replace(reader(one.pixels, want), index=one.index, labels=one.labels)
                for reader, (_, want) in zip(readers, traces, strict=True)
            )


class Reduction(Protocol):
    """An accumulator over a stream of traced batches."""

    def add(self, traced: Traced) -> None:
        """Add one batch."""


def reduce(
    subject: Subject, pictures: ImageSet, want: TraceRequest, reductions: Sequence[Reduction], batch: int | None = None
) -> None:
    """Trace a subject once and feed every batch to every reduction."""
    for (traced,) in stream([(subject, want)], pictures, batch):
        for reduction in reductions:
            reduction.add(traced)


class Mean:
    """The mean over images for each quantity and layer, summed in float64 (float32 if the device lacks it)."""

    def __init__(self, what: Iterable[What], heads: Sequence[int] | None = None) -> None:
        self.what, self.heads = tuple(what), heads
        self.count = 0
        self._sums: dict[tuple[What, int], Tensor] = {}

    def add(self, traced: Traced) -> None:
        """Add one batch."""
        self.count += len(traced.pixels)
        wide = torch.float32 if traced.pixels.device.type == "mps" else torch.float64
        for layer, found in traced.layers.items():
            for what in self.what:
                tensor = found.tensor(what, self.heads)
                total = tensor.sum(0, dtype=wide)
                self._sums[what, layer] = self._sums[what, layer] + total if (what, layer) in self._sums else total

    def result(self) -> dict[tuple[What, int], Tensor]:
        """Return (what, layer) -> its mean, on the CPU, shaped as in :data:`What` without B."""
        return {key: (total / self.count).cpu() for key, total in self._sums.items()}


def trace(
    subject: Subject,
    pictures: ImageSet,
    what: Iterable[str] = ("map",),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mean: bool = False,
    batch: int | None = None,
) -> dict[tuple[What, int], Tensor]:
    """Return (what, layer) -> a tensor on the CPU: all images (shaped as in :data:`What`) or their mean (no B).

    With ``mean``, memory does not grow with the number of images. heads: of map, logits, q, k, v; None: all. Raises
    UserError for an invalid request, TracingError for a quantity that can't be read.
    """
    want = request(subject, what, layers)
    check_heads(subject, heads)
    names: list[What] = [name for name in WHAT if name in want.what]
    if mean:
        average = Mean(names, heads)
        reduce(subject, pictures, want, [average], batch)
        return average.result()
    parts: dict[tuple[What, int], list[Tensor]] = {}
    for (traced,) in stream([(subject, want)], pictures, batch):
        for layer, found in traced.layers.items():
            for name in names:
                parts.setdefault((name, layer), []).append(found.tensor(name, heads).cpu())
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def check_heads(subject: Subject, heads: Sequence[int] | None) -> None:
    """Raise UserError for a head that a subject lacks."""
    count = subject.network.heads
    for head in heads or ():
        if not 0 <= head < count:
            raise UserError(f"head {head} is out of range: {subject.label} has {count} heads, 0 to {count - 1}")
