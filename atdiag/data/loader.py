"""Order and augmentation of training batches: a pure function of data seed, epoch and sample.

So a batch can be made at any time, in any process, in any company, and is the same. ``Stream.batch`` is that function;
``Stream.batches`` gives the same batches ahead of time from worker processes.

Images travel as uint8: a quarter of the bytes, and scaling, Mixup and CutMix happen where the networks are.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atdiag.core import randomness, resources
from atdiag.core.spec import Data, Recipe
from atdiag.data import datasets
from atdiag.data.augmentation import Augment
from atdiag.data.decoding import ImageFolder

PREFETCH = 2
"""Batches that each worker makes ahead."""

MOST_WORKERS = 16

Item = TypeVar("Item")


class WorkerDiedError(RuntimeError):
    """A process that makes batches is gone: killed, or out of memory."""


@dataclass(frozen=True)
class Batch:
    """images: uint8 [B, C, S, S] as loaded; float32 in [0, 1], mixed, once ``to`` a device. labels: int64 [B]; samples:
    int64 [B], indices into the training set.

    Where Mixup or CutMix applies, ``partner_labels`` [B] holds the other label of each image (the batch reversed),
    ``lam`` the share of its own, and ``box`` CutMix's top, bottom, left, right.
    """

    images: Tensor
    labels: Tensor
    samples: NDArray[np.int64]
    partner_labels: Tensor | None = None
    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, ready for a network: float32 in [0, 1], and mixed if it is to be."""
        partner = None if self.partner_labels is None else self.partner_labels.to(device, non_blocking=True)
        images, labels = (t.to(device, non_blocking=True) for t in (self.images, self.labels))
        if images.dtype == torch.uint8:
            images = self._mixed(images.float().div_(255))
        return replace(self, images=images, labels=labels, partner_labels=partner)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from where a copy to the GPU runs beside other work."""
        partner = None if self.partner_labels is None else self.partner_labels.pin_memory()
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        return replace(self, images=images, labels=labels, partner_labels=partner)

    def parts(self, size: int | None) -> Iterator[Batch]:
        """The batch in parts of at most ``size`` images; None: whole. It is on its device, and so mixed, already."""
        count = len(self.labels)
        if size is None or size >= count:
            yield self
            return
        for start in range(0, count, size):
            part = slice(start, start + size)
            partner = None if self.partner_labels is None else self.partner_labels[part]
            yield replace(
                self,
                images=self.images[part],
                labels=self.labels[part],
                samples=self.samples[part],
                partner_labels=partner,
            )

    def _mixed(self, images: Tensor) -> Tensor:
        """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) with the reversed batch, by timm's formulas."""
        if self.partner_labels is None:
            return images
        partner = images.flip(0)
        if self.box is None:
            return images * self.lam + partner * (1 - self.lam)
        top, bottom, left, right = self.box
        images[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        return images


class Stream:
    """The training batches of a data stream. Epochs are permutations; a last partial batch is left out."""

    def __init__(self, data: Data, recipe: Recipe, seed: int) -> None:
        if recipe.batch_size > data.train:
            raise ValueError(f"batch_size {recipe.batch_size} is larger than the training set ({data.train} images)")
        self.images = datasets.train_split(data, seed)
        self.recipe, self.seed = recipe, seed
        self.steps_per_epoch = len(self.images) // recipe.batch_size
        self._augment: Augment | None = None
        if augments(recipe):
            self._augment = Augment(recipe, seed, self.images.size, isinstance(self.images, ImageFolder))
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, randomness.generator(self.seed, "order", epoch).permutation(len(self.images))
        return self._epoch[1]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs. Raises BrokenImageError."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        samples = self._order(epoch)[position * size : (position + 1) * size]
        pixels = self.images.take(samples) if self._augment is None else self._augment(self.images, epoch, samples)
        images, labels = torch.from_numpy(pixels), torch.from_numpy(self.images.labels[samples])
        if self.recipe.mixup or self.recipe.cutmix:
            lam, box = self._mix(step)
            return Batch(images, labels, samples, labels.flip(0), lam, box)
        return Batch(images, labels, samples)

    def batches(self, start: int, stop: int, workers: int = 0, pin: bool = False) -> Generator[Batch, None, None]:
        """The batches of the steps from ``start`` to before ``stop``, in order, the same for any number of workers.

        Workers live until the iterator ends or is closed, over all epochs, and are ahead by ``PREFETCH`` batches each;
        with 0, batches are made here when they are asked for. ``pin`` (with CUDA): in page-locked memory.

        Raises BrokenImageError, and WorkerDiedError where a worker is killed.
        """
        return _in_order(self.batch, range(start, stop), workers, pin)

    def _mix(self, step: int) -> tuple[float, tuple[int, int, int, int] | None]:
        """The share of an image's own label at a step, and CutMix's box, or None for Mixup."""
        from timm.data.mixup import rand_bbox

        draw = randomness.generator(self.seed, "mix", step)
        mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
        use_cutmix = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
        alpha = cutmix if use_cutmix else mixup
        lam = float(draw.beta(alpha, alpha))
        if not use_cutmix:
            return lam, None
        # timm's box, with its two global draws replaced by ours.
        size = self.images.size
        top, bottom, left, right = box = _box(size, size, lam, draw, rand_bbox)
        return 1 - (bottom - top) * (right - left) / (size * size), box


def augments(recipe: Recipe) -> bool:
    """Whether a recipe changes images one by one."""
    return bool(recipe.crop is not None or recipe.flip or recipe.erase or recipe.rand_augment)


def test_batches(
    images: datasets.Split, size: int, workers: int = 0, pin: bool = False
) -> Generator[Tensor, None, None]:
    """All images of a split as a test sees them, in order: uint8 [b, C, S, S], b = ``size`` but for the last.

    Workers and ``pin`` as of :meth:`Stream.batches`.
    """
    return _in_order(_Chunks(images, size), range(0, len(images), size), workers, pin)


def default_workers(
    images: datasets.Images | ImageFolder, recipe: Recipe | None, device: torch.device, processes: int = 1
) -> int:
    """How many workers make batches, where the user says nothing. It changes how long they take, never what they are.

    No worker for arrays in memory that are not augmented (``recipe`` None: as a test sees them): taking them is faster
    than sending them. With CUDA, one for each processor that ``processes`` such trainings leave to each, at most 16.
    On a CPU, where workers take processors from the networks, one for every four.
    """
    if isinstance(images, datasets.Images) and (recipe is None or not augments(recipe)):
        return 0
    share = resources.available_cores() // max(processes, 1)
    return min(MOST_WORKERS, max(1, share)) if device.type == "cuda" else min(MOST_WORKERS, share // 4)


@dataclass(frozen=True)
class _Chunks:
    images: datasets.Split
    size: int

    def __call__(self, start: int) -> Tensor:
        return torch.from_numpy(self.images.batch(start, start + self.size))


@dataclass(frozen=True)
class _Fault:
    """What went wrong in a worker, sent home as it is: torch would wrap it into pages of traceback."""

    error: Exception


class _Items(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(index)
        except OSError as fault:
            return _Fault(fault)


def _in_order(make: Callable[[int], Item], indices: range, workers: int, pin: bool) -> Generator[Item, None, None]:
    """``make`` of each index in order, made here or ahead of time in worker processes."""
    if pin and not torch.cuda.is_available():
        raise ValueError("page-locked memory needs CUDA, which is not available here")
    if workers == 0:
        for index in indices:
            item: Any = make(index)
            yield item.pin_memory() if pin else item
        return
    loader: DataLoader[Any] = DataLoader(
        _Items(make),
        batch_size=None,  # an item is a whole batch
        sampler=indices,
        num_workers=min(workers, max(len(indices), 1)),
        prefetch_factor=PREFETCH,
        collate_fn=_same,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or it would advance the global one
    )
    ahead: Any = iter(loader)
    try:
        while (item := _next(ahead)) is not None:
            if isinstance(item, _Fault):
                raise item.error
            yield item
    finally:
        # Left to the garbage collector after an error, each worker is waited for five seconds.
        ahead._shutdown_workers()


def _next(ahead: Iterator[Any]) -> Any:
    """The next item, or None at the end."""
    try:
        return next(ahead, None)
    except RuntimeError as fault:
        if died := worker_died(fault):
            raise died from fault
        raise


def worker_died(fault: RuntimeError) -> WorkerDiedError | None:
    """The WorkerDiedError that torch means by a fault, if it means one.

    torch raises it from a signal's handler, so it may come out of whatever the process that trains is just doing.
    """
    if "DataLoader worker" not in str(fault) or isinstance(fault, WorkerDiedError):
        return None
    return WorkerDiedError(
        f"a process that loads images died: killed, or out of memory ({' '.join(str(fault).split())}): "
        "the same command goes on from the last checkpoint"
    )


def _same(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains, which then ends its workers


def _box(height: int, width: int, lam: float, draw: np.random.Generator, rand_bbox: Any) -> tuple[int, int, int, int]:
    with randomness.isolated(int(draw.integers(2**31)), "cutmix"):
        top, bottom, left, right = rand_bbox((height, width), lam)
    return int(top), int(bottom), int(left), int(right)
