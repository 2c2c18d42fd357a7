"""Run the functions on hook points during a pass, and cache values and gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from atdiag.hooks.points import HookPoint, on_gradient


class Collector:
    """Runs the hooks of each point, and caches values and gradients."""

    def __init__(
        self,
        points: dict[str, HookPoint],
        wanted: frozenset[str] = frozenset(),
        device: torch.device | str | None = None,
        gradients: bool = False,
    ) -> None:
        self.points, self.wanted, self.device, self.gradients = points, wanted, device, gradients
        self.cache: dict[str, Tensor] = {}
        self.leaves: list[Tensor] = []
        self.backward = gradients or any(point.bwd_hooks for point in points.values())
        self._asked = wanted | {name for name, point in points.items() if point.has_hooks()}

    def wants(self, name: str) -> bool:
        """Return whether a point has functions or is cached."""
        return name in self._asked

    def take(self, name: str, value: Tensor) -> Tensor:
        """Run a point's functions and cache what they leave; return it."""
        point = self.points[name]
        value = point.run_forward(value)
        cached = name in self.wanted
        backward = torch.is_grad_enabled() and (bool(point.bwd_hooks) or (cached and self.gradients))
        if backward:
            if not value.requires_grad:  # nothing before it has a gradient, as for position embeddings
                value = value.detach().requires_grad_()
                self.leaves.append(value)
            value = value.view_as(value)
            point.watch(value)
            if cached and self.gradients:
                on_gradient(value, partial(self._keep, f"{name}_grad"))
        if cached:
            self._keep(name, value)
        return value

    def _keep(self, name: str, value: Tensor) -> None:
        self.cache[name] = value.detach().to(self.device or value.device)
