"""nnsight as an instrument that leaves no trace: how it is loaded, what it plants, and its faults in our words."""

from __future__ import annotations

import re
import sys
from typing import Any

PLANTED = ("forward", "__nnsight__")
"""What nnsight leaves on a module whose source it has read."""


def nnsight() -> Any:
    """The module nnsight, without the ``save`` that it hangs on every object of the process when it is imported."""
    fresh = "nnsight" not in sys.modules
    import nnsight

    if fresh:
        from nnsight import _c

        if _c.unmount is not None:
            _c.unmount("save")
    return nnsight


def out_of_order() -> type[Exception]:
    """What nnsight raises where a place is waited for that was passed, or is never reached."""
    from nnsight.intervention.interleaver import OutOfOrderError

    kind: type[Exception] = OutOfOrderError
    return kind


def translated(fault: Exception) -> str:
    """What nnsight says of a place that was not reached when it was waited for, in our words."""
    found = re.search(r"blocks\.(\d+)\.?([\w.]*)", str(fault))
    if not found:
        return str(fault)
    return (
        f"layer {found[1]}: {found[2].split('.input')[0] or 'the block'} was not run where it was expected: the "
        "network takes another path through its attention, or leaves the block out"
    )
