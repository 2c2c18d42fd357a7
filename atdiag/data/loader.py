"""Order and augmentation of training batches: a pure function of data seed, epoch and sample.

A batch is therefore the same in whichever process and order it is made. ``Stream.batch`` is that function;
``Stream.batches`` yields the same batches, prepared in advance by worker processes.

Images are transferred as uint8: a quarter of the bytes; scaling, Mixup and CutMix happen on the networks' device.
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
from atdiag.data import sources
from atdiag.data.augmentation import Augment
from atdiag.data.decoding import ImageFolder
from atdiag.data.splits import Images, Split

PREFETCH = 2
"""Batches that each worker prepares in advance."""

MOST_WORKERS = 16

Item = TypeVar("Item")


class WorkerDiedError(RuntimeError):
    """A worker process that prepares batches died: killed, or out of memory."""


@dataclass(frozen=True)
class Batch:
    """A batch of training images.

    images: uint8 [B, C, S, S] as loaded; float32 in [0, 1], mixed, after ``to`` a device. labels: int64 [B]; samples:
    int64 [B], indices into the training set.

    With Mixup or CutMix, ``partner_labels`` [B] holds the other label of each image (the batch reversed), ``lam`` the
    share of its own, and ``box`` CutMix's top, bottom, left, right.
    """

    images: Tensor
    labels: Tensor
    samples: NDArray[np.int64]
    partner_labels: Tensor | None = None
    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device as network input: float32 in [0, 1], with Mixup or CutMix applied if any."""
        partner = None if self.partner_labels is None else self.partner_labels.to(device, non_blocking=True)
        images, labels = (t.to(device, non_blocking=True) for t in (self.images, self.labels))
        if images.dtype == torch.uint8:
            images = self._mixed(images.float().div_(255))
        return replace(self, images=images, labels=labels, partner_labels=partner)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from where copies to the GPU are asynchronous."""
        partner = None if self.partner_labels is None else self.partner_labels.pin_memory()
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        return replace(self, images=images, labels=labels, partner_labels=partner)

    def parts(self, size: int | None) -> Iterator[Batch]:
        """Yield micro-batches of at most ``size`` images; None: the whole batch. Call after :meth:`to`."""
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
        """Apply Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) with the reversed batch, by timm's formulas."""
        if self.partner_labels is None:
            return images
        partner = images.flip(0)
        if self.box is None:
            return images * self.lam + partner * (1 - self.lam)
        top, bottom, left, right = self.box
        images[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        return images


class Stream:
    """The training batches of a data stream. Epochs are permutations; a last partial batch is dropped."""

    def __init__(self, data: Data, recipe: Recipe, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """rank, ranks: make only this rank's shard of each batch (see :func:`shard`)."""
        if recipe.batch_size > data.train:
            raise ValueError(f"batch_size {recipe.batch_size} is larger than the training set ({data.train} images)")
        self._rows = None if ranks == 1 else shard(recipe, rank, ranks)
        self.images = sources.find(data).train_split(data, seed)
        self.recipe, self.seed = recipe, seed
        self.steps_per_epoch = len(self.images) // recipe.batch_size
        self._augment: Augment | None = None
        if augments(recipe):
            real = isinstance(self.images, ImageFolder)
            self._augment = Augment(recipe, seed, self.images.size, real, data.interpolation)
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, randomness.generator(self.seed, "order", epoch).permutation(len(self.images))
        return self._epoch[1]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0 over all epochs. Raises BrokenImageError."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.recipe.batch_size
        samples = self._order(epoch)[position * size : (position + 1) * size]
        if self._rows is not None:
            samples = samples[self._rows]
        pixels = self.images.take(samples) if self._augment is None else self._augment(self.images, epoch, samples)
        images, labels = torch.from_numpy(pixels), torch.from_numpy(self.images.labels[samples])
        if self.recipe.mixes:
            lam, box = self._mix(step)
            return Batch(images, labels, samples, labels.flip(0), lam, box)
        return Batch(images, labels, samples)

    def batches(self, start: int, stop: int, workers: int = 0, pin: bool = False) -> Generator[Batch, None, None]:
        """Yield the batches of steps ``[start, stop)`` in order, the same for any number of workers.

        Workers live until the iterator ends or is closed, over all epochs, each ``PREFETCH`` batches ahead; with 0
        workers, batches are made on demand in this process. pin (with CUDA): use page-locked memory.

        Raises BrokenImageError, and WorkerDiedError if a worker is killed.
        """
        return _in_order(self.batch, range(start, stop), workers, pin)

    def _mix(self, step: int) -> tuple[float, tuple[int, int, int, int] | None]:
        """Return the share of an image's own label at a step, and CutMix's box, or None for Mixup."""
        from timm.data.mixup import rand_bbox

        draw = randomness.generator(self.seed, "mix", step)
        mixup, cutmix = self.recipe.mixup, self.recipe.cutmix
        use_cutmix = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
        alpha = cutmix if use_cutmix else mixup
        lam = float(draw.beta(alpha, alpha))
        if not use_cutmix:
            return lam, None
        # timm's box, with its two draws from a global generator replaced by ours.
        size = self.images.size
        top, bottom, left, right = box = _box(size, size, lam, draw, rand_bbox)
        return 1 - (bottom - top) * (right - left) / (size * size), box


def shard(recipe: Recipe, rank: int, ranks: int) -> NDArray[np.int64]:
    """Return the rows of a global batch that one of several ranks trains on, ascending: as equal shares as can be.

    Where Mixup or CutMix mixes row i with row B - 1 - i, both are in the same shard. Reversing the shard then pairs
    its images as reversing the global batch does, and no rank loads an image of another.

    Raises ValueError if there are more ranks than images, or than pairs of images.

    >>> [shard(Recipe(epochs=1, batch_size=7, mixup=0.8), rank, 3).tolist() for rank in range(3)]
    [[0, 6], [1, 5], [2, 3, 4]]
    """
    if ranks > recipe.most_ranks:
        raise ValueError(f"a batch of {recipe.batch_size} has {recipe.most_ranks} shards at most, not {ranks}")
    share = np.arange(recipe.most_ranks * rank // ranks, recipe.most_ranks * (rank + 1) // ranks)
    return np.unique([share, recipe.batch_size - 1 - share]) if recipe.mixes else share


def augments(recipe: Recipe) -> bool:
    """Return whether a recipe augments single images."""
    return bool(recipe.crop is not None or recipe.flip or recipe.erase or recipe.rand_augment)


def test_batches(
    images: Split, size: int, workers: int = 0, pin: bool = False, starts: range | None = None
) -> Generator[Tensor, None, None]:
    """Yield all images of a split in the test view, in order: uint8 [b, C, S, S], b = ``size`` but for the last batch.

    Workers and ``pin`` as in :meth:`Stream.batches`. starts: the first images of the batches to yield; None: all.
    """
    return _in_order(_Chunks(images, size), range(0, len(images), size) if starts is None else starts, workers, pin)


def default_workers(images: Split, recipe: Recipe | None, device: torch.device, processes: int = 1) -> int:
    """Return the default number of workers. It affects only speed, never the batches.

    0 for arrays in memory without augmentation (``recipe`` None: test view): indexing them is faster than sending
    them. With CUDA, the cores available to each of ``processes`` training processes, at most 16. On a CPU, where
    workers compete with the networks, one for every four cores.
    """
    if isinstance(images, Images) and (recipe is None or not augments(recipe)):
        return 0
    share = resources.available_cores() // max(processes, 1)
    return min(MOST_WORKERS, max(1, share)) if device.type == "cuda" else min(MOST_WORKERS, share // 4)


@dataclass(frozen=True)
class _Chunks:
    images: Split
    size: int

    def __call__(self, start: int) -> Tensor:
        return torch.from_numpy(self.images.batch(start, start + self.size))


@dataclass(frozen=True)
class _Fault:
    """An error in a worker, passed back as it is: torch would wrap it in a long traceback."""

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
    """Yield ``make(index)`` in order, made here or in advance by worker processes."""
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
        generator=torch.Generator(),  # otherwise it would advance the global one
    )
    ahead: Any = iter(loader)
    try:
        while (item := _next(ahead)) is not None:
            if isinstance(item, _Fault):
                raise item.error
            yield item
    finally:
        # Otherwise garbage collection after an error waits five seconds for each worker.
        ahead._shutdown_workers()


def _next(ahead: Iterator[Any]) -> Any:
    """Return the next item, or None at the end."""
    try:
        return next(ahead, None)
    except RuntimeError as fault:
        if died := worker_died(fault):
            raise died from fault
        raise
    except (ConnectionError, EOFError, FileNotFoundError) as fault:  # it died while it handed a batch over
        raise _died(fault) from fault


def worker_died(fault: RuntimeError) -> WorkerDiedError | None:
    """Return the WorkerDiedError that torch's exception stands for, if any.

    torch raises it from a signal handler, so it may come out of any operation of the training process.
    """
    if "DataLoader worker" not in str(fault) or isinstance(fault, WorkerDiedError):
        return None
    return _died(fault)


def _died(fault: Exception) -> WorkerDiedError:
    return WorkerDiedError(
        f"a process that loads images died: killed, or out of memory ({' '.join(str(fault).split())}): "
        "the same command goes on from the last checkpoint"
    )


def _same(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process handles Ctrl-C, and ends its workers


def _box(height: int, width: int, lam: float, draw: np.random.Generator, rand_bbox: Any) -> tuple[int, int, int, int]:
    with randomness.isolated(int(draw.integers(2**31)), "cutmix"):
        top, bottom, left, right = rand_bbox((height, width), lam)
    return int(top), int(bottom), int(left), int(right)
