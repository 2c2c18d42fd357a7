"""Compile the blocks of teachers and students (torch.compile): equal numbers up to rounding, fewer kernels."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

from atdiag.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from atdiag.networks.model.vit import ViT

VARIABLE = "ATDIAG_COMPILE"

_LIMIT = 64
"""Maximum compiled variants of a block per process: one for each combination of components, overrides, captures and
drop path."""


def choice() -> str:
    """Return ``ATDIAG_COMPILE``: "1", "0" or empty. Raises UserError for anything else."""
    said = os.environ.get(VARIABLE, "")
    if said not in ("", "0", "1"):
        raise UserError(f"{VARIABLE}={said}", "give 1 to compile the networks, 0 not to")
    return said


def wanted(device: torch.device) -> bool:
    """Return whether to compile networks: on CUDA only, unless ``ATDIAG_COMPILE`` (0 or 1) says otherwise.

    On a CPU, compiling takes longer than a miniature's whole training.
    """
    said = choice()
    return device.type == "cuda" if said == "" else said == "1"


def compile_blocks(network: ViT, backend: str = "inductor") -> None:
    """Compile every block of a network in place; blocks of one shape share their compiled code.

    With ``fullgraph`` a graph break is an error instead of a silent loss of speed. So is exceeding the recompilation
    limit, where torch would otherwise silently run uncompiled.
    """
    import torch

    torch._dynamo.config.recompile_limit = _LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # else it splits graphs for DistributedDataParallel; a block is small
    for block in network.blocks:
        for name in ("forward", "see"):
            setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, dynamic=False, backend=backend))


def eagerly() -> AbstractContextManager[None]:
    """Run compiled networks uncompiled: for test images, whose last batch has a different shape."""
    import torch

    return cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))
