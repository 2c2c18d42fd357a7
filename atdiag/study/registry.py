"""The installed ablations, found by entry points and ordered by their decorators.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

GROUP = "atdiag.ablations"
"""Entry-point group: command name -> function."""

_OURS = "ablations."
_ATTRIBUTE = "__ablation__"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Placement:
    """An ablation's position in listings, and its options for ``atdiag reproduce``.

    An option with several values in a tuple is varied over them, and the studies are read together.
    """

    order: int
    reproduce: Mapping[str, Any] = field(default_factory=dict)
    mini: Mapping[str, Any] | None = None
    """Replaces ``reproduce`` at profile mini."""
    quick: Mapping[str, Any] | None = None
    """Replaces either of them with ``--quick``."""
    papers: tuple[str, ...] = ("2026",)
    """The papers whose analysis it is: 2024 (Li et al.), 2026 (Qin et al.); without one it is not reproduced."""

    def options(self, profile: str, quick: bool) -> Mapping[str, Any]:
        """Return the options at a profile."""
        if quick and self.quick is not None:
            return self.quick
        return self.mini if profile == "mini" and self.mini is not None else self.reproduce


def ablation(
    *,
    order: int,
    reproduce: Mapping[str, Any],
    mini: Mapping[str, Any] | None = None,
    quick: Mapping[str, Any] | None = None,
    papers: tuple[str, ...] = ("2026",),
) -> Callable[[Function], Function]:
    """Declare an ablation's position in listings and its options for ``atdiag reproduce``::

    @ablation(order=60, reproduce={"module": ("mlp", "attn")})
    def reinit(lab: Lab, ...) -> Study: ...

    A function without this decorator is still a command, listed last, but not part of ``reproduce``.
    """

    def place(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, Placement(order, reproduce, mini, quick, papers))
        return function

    return place


def placement(function: Callable[..., Any]) -> Placement | None:
    """Return a function's placement from :func:`ablation`; None without one."""
    return getattr(function, _ATTRIBUTE, None)


@dataclass(frozen=True)
class Installed:
    """An ablation provided by a package: its function, or why it can't be loaded."""

    name: str
    source: str
    """``package.module:function``."""
    function: Callable[..., Any] | None
    fault: str = ""


def installed() -> list[Installed]:
    """Return every ablation in order; among those of one name ours, if any, is first."""
    found = [_loaded(entry.name, entry.value, entry.load) for entry in _entries()]

    def rank(one: Installed) -> tuple[bool, float]:
        place = None if one.function is None else placement(one.function)
        return not one.source.startswith(_OURS), float("inf") if place is None else place.order

    return sorted(found, key=rank)


def placed() -> dict[str, tuple[Callable[..., Any], Placement]]:
    """Return the ablations in ``atdiag reproduce``, by name, in order."""
    out: dict[str, tuple[Callable[..., Any], Placement]] = {}
    for one in installed():
        place = None if one.function is None else placement(one.function)
        if one.function is not None and place is not None and place.papers:
            out.setdefault(one.name, (one.function, place))
    return out


def _entries() -> Iterator[Any]:
    yield from entry_points(group=GROUP)


def _loaded(name: str, source: str, load: Callable[[], Any]) -> Installed:
    try:
        return Installed(name, source, load())
    except Exception as fault:  # an error in another package must not disable the other commands
        return Installed(name, source, None, f"{type(fault).__name__}: {fault}")
