"""Load nnsight without side effects on the process, and translate its errors."""

from __future__ import annotations

import re
import sys
from typing import Any

PLANTED = ("forward", "__nnsight__")
"""Attributes that nnsight leaves on a module whose source it has read."""


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
