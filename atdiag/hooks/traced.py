"""A network under nnsight with hook points by name.

    with model.nnsight.trace(images):
        pattern = model.nnsight.save(model.nnsight["pattern", 5].output)
        model.nnsight["blocks.6.attn.hook_z"].output = torch.zeros(...)
        logits = model.nnsight.save(model.nnsight.output)

As everything under nnsight, points are read in the order of execution, and what is to outlive the trace is saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from atdiag.analysis import instrument
from atdiag.analysis.points.names import act_name
from atdiag.analysis.points.places import Middle, PointPlace, Results
from atdiag.analysis.points.running import Runner
from atdiag.core.errors import UserError


class TracedPoint:
    """A hook point within a trace."""

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner, self.name = runner, name
        self._place: PointPlace = next(one for one in runner.layout.places if name in one.points)

    @property
    def output(self) -> Tensor:
        """The value; assigning to it replaces it. For ``hook_resid_mid`` and ``hook_result`` it can only be read."""
        found: list[Tensor] = []
        self._visit(found.append)
        return found[0]

    @output.setter
    def output(self, value: Tensor) -> None:
        if isinstance(self._place, Middle | Results):
            raise UserError(f"{self.name} can only be read within a trace", "write it in a hook")
        self._visit(lambda _: value)

    def _visit(self, call: Any) -> None:
        class Only:
            def wants(self, name: str) -> bool:
                return name == wanted

            def take(self, name: str, value: Tensor) -> Tensor:
                out = call(value)
                return value if out is None else out

        wanted = self.name
        self._place.visit(replace(self._runner.own, taker=Only()))


class TracedModel:
    """nnsight's model of a network: everything that it has, and hook points by name or short name."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getitem__(self, key: str | tuple[Any, ...]) -> TracedPoint:
        name = act_name(key) if isinstance(key, str) else act_name(*key)
        self._runner.layout.check(name)
        return TracedPoint(self._runner, name)

    def trace(self, images: Tensor, **options: Any) -> Any:
        """Return nnsight's tracing context for images [B, channels, S, S] in [0, 1]."""
        return self._runner.root.trace(*self._runner.begin(images), **options)

    def save(self, value: Any) -> Any:
        """Keep a value of a trace beyond its end; return it."""
        return instrument.nnsight().save(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner.root, name)
