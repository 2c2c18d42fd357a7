"""The architecture that all miniature teachers share: 12 blocks, 20 x 20 px, patches of 4 px, 10 classes."""

from __future__ import annotations

from typing import Any

from atdiag.core.spec import Network

DEPTH = 12

SIZES: dict[str, dict[str, int]] = {"s": {"width": 32, "heads": 2}, "b": {"width": 48, "heads": 3}}


def network(size: str, **own: Any) -> Network:
    """Return the architecture of a miniature of size ``s`` or ``b``. own: its components and their values."""
    return Network(
        image_size=20,
        patch_size=4,
        channels=1,
        depth=DEPTH,
        classes=10,
        mean=(0.18,),
        std=(0.33,),
        **SIZES[size],
        **own,
    )
