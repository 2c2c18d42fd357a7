"""Hook points and the functions on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from atdiag.analysis.points.names import layer_of
from atdiag.core.errors import UserError

Direction = Literal["fwd", "bwd"]
HookFunction: TypeAlias = Callable[..., Any]
"""Called as ``fn(value, hook=point)``; returns a value to go on with, or None."""


@dataclass(frozen=True)
class HookHandle:
    """A function on a point."""

    user_hook: HookFunction
    is_permanent: bool = False
    context_level: int | None = None


def on_gradient(value: Tensor, call: Callable[[Tensor], Tensor | None]) -> None:
    """Have a function called with the gradient to a value when it is taken; what it returns takes its place."""
    value.register_hook(call)  # type: ignore[no-untyped-call]


class HookPoint:
    """A named place in a network, with the functions that are called there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[Any, Any] = {}
        """A place for a hook's own data, between calls."""
        self.fwd_hooks: list[HookHandle] = []
        self.bwd_hooks: list[HookHandle] = []

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, {len(self.fwd_hooks)} fwd, {len(self.bwd_hooks)} bwd)"

    def layer(self) -> int:
        """Return the block that the point is in. Raises ValueError outside the blocks."""
        return layer_of(self.name)

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a function, after those that are there or before them."""
        if dir not in ("fwd", "bwd"):
            raise UserError(f"a hook's direction is fwd or bwd, not {dir!r}")
        hooks = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        hooks.insert(0 if prepend else len(hooks), HookHandle(hook, is_permanent, level))

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove functions: all that are not permanent, or those of one context level."""

        def stays(one: HookHandle) -> bool:
            if including_permanent:
                return False
            return one.is_permanent or (level is not None and one.context_level != level)

        if dir in ("fwd", "both"):
            self.fwd_hooks = [one for one in self.fwd_hooks if stays(one)]
        if dir in ("bwd", "both"):
            self.bwd_hooks = [one for one in self.bwd_hooks if stays(one)]

    def has_hooks(self, dir: Literal["fwd", "bwd", "both"] = "both") -> bool:
        """Return whether there are functions on this point."""
        return bool((dir != "bwd" and self.fwd_hooks) or (dir != "fwd" and self.bwd_hooks))

    def clear_context(self) -> None:
        """Empty ``ctx``."""
        self.ctx = {}

    def run_forward(self, value: Tensor) -> Tensor:
        """Call the functions in order; return the value to go on with, the same object if none changed it.

        Raises UserError for a result of another shape, dtype or device.
        """
        for one in list(self.fwd_hooks):
            given = value.clone()  # a hook may write into it, and other points share its memory
            version = None if given.is_inference() else given._version
            out = one.user_hook(given, hook=self)
            out = given if out is None else self._checked(out, value)
            same = out is given and (given._version == version if version is not None else torch.equal(given, value))
            value = value if same and not value.requires_grad else out
        return value

    def watch(self, value: Tensor) -> None:
        """Have the backward functions called with the gradient to a value, when it is taken."""
        for one in list(self.bwd_hooks):
            on_gradient(value, partial(self._backward, one))

    def _backward(self, one: HookHandle, grad: Tensor) -> Tensor | None:
        out = one.user_hook(grad, hook=self)
        if isinstance(out, tuple) and len(out) == 1:  # as TransformerLens allows
            (out,) = out
        return None if out is None else self._checked(out, grad)

    def _checked(self, out: Any, value: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise UserError(f"the hook on {self.name} returned {type(out).__name__}", "return a tensor, or None")
        for what in ("shape", "dtype", "device"):
            new, old = getattr(out, what), getattr(value, what)
            if new != old:
                new, old = (list(one) if isinstance(one, torch.Size) else one for one in (new, old))
                raise UserError(f"the hook on {self.name} returned a tensor of {what} {new}, and the point's is {old}")
        return out
