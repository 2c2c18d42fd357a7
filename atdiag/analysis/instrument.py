"""Load nnsight without side effects on the process, and translate its errors."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_PLANTED = ("forward", "__nnsight__")
"""Attributes that nnsight leaves on a module whose source it has read."""


class Instrument:
    """A module under nnsight.

    nnsight replaces the forward of every module whose source it reads, and leaves it replaced: :meth:`restore` undoes
    this.
    """

    def __init__(self, module: nn.Module) -> None:
        self._before = {m: {k: m.__dict__[k] for k in _PLANTED if k in m.__dict__} for m in module.modules()}
        self.root: Any = nnsight().NNsight(module)

    def restore(self) -> None:
        """Leave the modules as they were."""
        for module, had in self._before.items():
            for name in _PLANTED:
                module.__dict__.pop(name, None)
            module.__dict__.update(had)
        self._before, self.root = {}, None


def nnsight() -> Any:
    """Import nnsight, without the ``save`` method that its import adds to every Python object of the process."""
    fresh = "nnsight" not in sys.modules
    import nnsight

    if fresh:
        from nnsight import _c

        if _c.unmount is not None:
            _c.unmount("save")
    return nnsight


def out_of_order() -> type[Exception]:
    """Return the error that nnsight raises for a location that was already passed, or is never reached."""
    from nnsight.intervention.interleaver import OutOfOrderError

    kind: type[Exception] = OutOfOrderError
    return kind


def translated(fault: Exception) -> str:
    """Describe, in our words, nnsight's error for a location that was not reached."""
    found = re.search(r"blocks\.(\d+)\.?([\w.]*)", str(fault))
    if not found:
        return str(fault)
    return (
        f"layer {found[1]}: {found[2].split('.input')[0] or 'the block'} was not run where it was expected: the "
        "network takes another path through its attention, or skips the block"
    )
