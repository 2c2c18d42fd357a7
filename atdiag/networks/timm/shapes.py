"""Build networks of shapes alone, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    ("uniform_", "normal_", "trunc_normal_", "fill_", "zero_", "copy_", "erfinv_", "clamp_", "mul_", "add_", "div_")
)
"""In-place operations of initialisation: they change a tensor's values and not its shape."""


class _NoValues(TorchFunctionMode):
    """Skip initialisation: a meta tensor has no values, but PyTorch's rules of shapes take 20 ms for each operation."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _FILLS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Create tensors on the meta device, and skip what would initialise them."""
    with torch.device("meta"), _NoValues():
        yield
