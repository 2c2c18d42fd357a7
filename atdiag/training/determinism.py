"""How a GPU computes: float32 as float32, and the same bits again where asked for (``--deterministic``).

A CPU with a fixed number of threads is reproducible anyway; there the option changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from atdiag.core.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

_REPEATABLE = (":4096:8", ":16:8")
"""cuBLAS workspaces that guarantee reproducible results on several streams; the second is smaller and slower."""


@contextmanager
def float32_as_float32() -> Iterator[None]:
    """Multiply float32 as float32 inside the context, not as TF32, whose mantissa has 10 bits instead of 23.

    PyTorch's default for matrix products, but not for convolutions: in float32 the gradient of a patch embedding was
    off by 1.4e-4 (relative, one H100), that of every other parameter by 6e-6 at most.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def algorithms(wanted: bool) -> Iterator[None]:
    """Restrict torch to deterministic algorithms inside the context if ``wanted``.

    An operation without a deterministic algorithm is an error: with torch's ``warn_only`` the backward passes of flash
    and memory-efficient attention would not be deterministic either. cuDNN's attention is not deterministic and is
    disabled; cuDNN's convolutions are not selected by benchmark; torch's compiler, where it has a deterministic mode,
    follows this switch.

    Sets ``CUBLAS_WORKSPACE_CONFIG`` and leaves it set, since cuBLAS reads it once. Raises UserError if CUDA was
    initialised without it.
    """
    if not wanted:
        yield
        return
    if os.environ.get(WORKSPACE) not in _REPEATABLE:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UserError(
                "CUDA was initialised in this process without a deterministic workspace",
                f"set {WORKSPACE}={_REPEATABLE[0]} before the process starts",
            )
        os.environ[WORKSPACE] = _REPEATABLE[0]
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    )
    _set(True, False, False, False)
    try:
        yield
    finally:
        _set(*before)


def _set(on: bool, warn_only: bool, benchmark: bool, cudnn_attention: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
