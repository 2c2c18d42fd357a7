"""The same bits from a GPU each time: what ``--deterministic`` switches on.

A CPU gives them anyway, with one number of threads; there the option changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from atdiag.core.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

_REPEATABLE = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS promises the same bits on several streams; the second is smaller and slower."""


@contextmanager
def algorithms(wanted: bool) -> Iterator[None]:
    """While it lasts, torch uses deterministic algorithms alone, if they are ``wanted``.

    Strictly: an operation that has none is an error. With torch's ``warn_only`` the backward passes of flash and of
    memory-efficient attention would not be deterministic either. cuDNN's attention is not, so it is off; cuDNN's
    convolutions are not chosen by a race; and torch's compiler, where it has a deterministic mode, follows this switch.

    Sets ``CUBLAS_WORKSPACE_CONFIG``, which stays set: cuBLAS reads it once. Raises UserError where CUDA was begun
    without it.
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
