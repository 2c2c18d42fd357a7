"""Ranks: processes that train the same runs together, each on its shard of every global batch.

A loss is a mean over the global batch. Each rank weights the mean over its shard by the shard's share of the batch, so
that unequal shards are exact, and the ranks' gradients are summed (DistributedDataParallel averages them, so losses are
scaled by the number of ranks). Random numbers are functions of seed, step and sample and do not know of ranks.

What is decided while training (to stop, to save, that a loss is not finite) is decided by all ranks alike, from numbers
that all have. The first rank alone reads and writes run directories.

Decisions and objects pass through gloo even where gradients pass through NCCL: a rank that dies closes its connections,
which the others notice within a step, whereas NCCL would wait.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from atdiag.core.errors import FaultError, UserError

MEETING = "ATDIAG_MEETING"
"""Environment variable: the file through which ranks of one machine meet; without it, as torchrun arranged."""

_PATIENCE = timedelta(minutes=30)
"""Maximum time for which a rank waits for the others: they may compile, or read a large folder."""

T = TypeVar("T")


class RankLostError(FaultError):
    """Another rank of this training has ended, and with it the training."""


class RankGroup:
    """This process's place among the ranks; by default it is alone, and no method costs anything.

    index: from 0, over all machines. local: the same on this machine, of ``here``, which chooses the device.
    """

    def __init__(self, index: int = 0, count: int = 1, local: int = 0, here: int = 1) -> None:
        self.index, self.count, self.local, self.here = index, count, local, here
        self._nccl: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank reads and writes run directories."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's own device of a kind, and prepare to sum tensors there. Called by all ranks at once.

        Raises UserError if this machine has too few.
        """
        if self.count == 1 or device.type == "cpu":
            return device
        if device.type != "cuda" or self.here > torch.cuda.device_count():
            have = torch.cuda.device_count() if device.type == "cuda" else 1
            raise UserError(f"`ranks` {self.here} need a {device.type} device each, and this machine has {have}")
        own = torch.device(device.type, self.local)
        torch.cuda.set_device(own)
        if self._nccl is None:
            group = dist.new_group(backend="nccl", timeout=_PATIENCE)
            assert isinstance(group, ProcessGroup)  # new_group returns a number on ranks that it leaves out
            self._nccl = group
        return own

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward pass averages gradients over the ranks; its weights become the first rank's.

        Every parameter that requires a gradient must get one.
        """
        if self.count == 1:
            return module
        device = next(module.parameters()).device
        # Older versions of torch do not know the argument's new name.
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
        # Of a patch embedding's gradient, where a channel of one has another stride: the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(
            module, process_group=self._group(device), broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def alone(self, module: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Keep the gradients of one backward pass of a :meth:`parallel` module on this rank, to be averaged later."""
        if not wanted or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, in the same bits on all; it is computed in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self._group(tensor.device))
        return tensor

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank."""
        if self.count == 1:
            return flags
        joint = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(joint, dist.ReduceOp.MAX)
        return tuple(map(bool, joint.tolist()))

    def shared(self, value: T) -> T:
        """Return the first rank's value."""
        if self.count == 1:
            return value
        box: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(box)
        out: T = box[0]
        return out

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        out: list[Any] = [None] * self.count
        dist.all_gather_object(out, value)
        return out

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise RankLostError in place of the errors by which torch reports that another rank has ended."""
        try:
            yield
        except RuntimeError as fault:
            if self.count > 1 and (isinstance(fault, dist.DistError) or "gloo" in str(fault)):
                raise RankLostError(
                    f"rank {self.index} of {self.count} stopped because another rank did: "
                    "the same command goes on from the last checkpoint"
                ) from fault
            raise

    def _group(self, device: torch.device) -> ProcessGroup | None:
        return self._nccl if device.type == "cuda" else None


ALONE = RankGroup()


def join() -> tuple[RankGroup, Store]:
    """Meet the other ranks that were started with this process, and return its place and their common store.

    Read from the environment as torchrun sets it: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and,
    unless ``MEETING`` names a file, ``MASTER_ADDR`` and ``MASTER_PORT``. Raises UserError if that is missing.
    """
    try:
        index, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as fault:
        raise UserError(f"ranks are started by torchrun, or by `ranks`: the environment lacks {fault}") from None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    store: Store
    if path := os.environ.get(MEETING):
        store = dist.FileStore(path, count)  # type: ignore[attr-defined]
    else:
        store, index, count = next(rendezvous("env://", timeout=_PATIENCE))
    store = PrefixStore("atdiag", store)
    dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=_PATIENCE)
    return RankGroup(index, count, local, here), store
