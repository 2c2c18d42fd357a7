"""Compiling the blocks of teachers and students (torch.compile): the same numbers within rounding, in fewer kernels."""

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
"""Compiled forms of a block in one process: one for each mix of components and of what is given, seen and dropped."""


def choice() -> str:
    """What the user says of compiling: "1", "0" or nothing. Raises UserError for anything else."""
    said = os.environ.get(VARIABLE, "")
    if said not in ("", "0", "1"):
        raise UserError(f"{VARIABLE}={said}", "give 1 to compile the networks, 0 not to")
    return said


def wanted(device: torch.device) -> bool:
    """Whether networks are compiled: on CUDA, unless ``ATDIAG_COMPILE`` (0 or 1) says otherwise.

    On a CPU the compiler takes longer than a miniature's whole training.
    """
    said = choice()
    return device.type == "cuda" if said == "" else said == "1"


def compile_blocks(network: ViT, backend: str = "inductor") -> None:
    """Compile every block of a network in place. All blocks of one shape share what is compiled.

    ``fullgraph``: a break in a block's graph is an error and no silent loss of speed. So is one recompilation too many,
    where torch would fall back to running uncompiled without a word.
    """
    import torch

    torch._dynamo.config.recompile_limit = _LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in network.blocks:
        for name in ("forward", "see"):
            setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, dynamic=False, backend=backend))


def eagerly() -> AbstractContextManager[None]:
    """Run compiled networks uncompiled: for test images, whose last batch has a shape of its own."""
    import torch

    return cast(AbstractContextManager[None], torch.compiler.set_stance("force_eager"))
