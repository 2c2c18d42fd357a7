"""A hash of atdiag's source: a node of a cluster with another one refuses an order."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def digest(package: Path = Path(__file__).parents[1]) -> str:
    """Return the sha256 of a package's Python files, names included."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()
