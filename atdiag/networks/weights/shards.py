"""Weights in several files (shards), as an index lists them: ``model.safetensors.index.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from atdiag.core.errors import UserError
from atdiag.core.resources import small_file

_ENDING = ".index.json"


class WeightsError(UserError, ValueError):
    """A weight file is refused; the message gives the reason in one line."""


def is_index(path: Path) -> bool:
    """Return whether a file is an index of shards, by its name."""
    return path.name.endswith(_ENDING)


def weight_map(path: Path) -> dict[str, str]:
    """Return an index's shard for each key. Raises WeightsError for a file that is no index of files beside it."""
    try:
        found = json.loads(small_file(path))["weight_map"]
        entries = {str(key): str(name) for key, name in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise WeightsError(f"{path} is no index of shards ({type(fault).__name__}: {fault})") from None
    if not entries:
        raise WeightsError(f"{path} lists no shards")
    # A name with a folder could lead to any file of this machine.
    if odd := sorted({name for name in entries.values() if Path(name).name != name or is_index(Path(name))}):
        raise WeightsError(f"{path} lists {odd[0]!r}, which is no weight file in its own folder")
    return entries


def members(path: Path) -> list[Path]:
    """Return an index's shards, in the order of their names. Raises WeightsError, naming those that are missing."""
    found = [path.with_name(name) for name in sorted(set(weight_map(path).values()))]
    if missing := [one.name for one in found if not one.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{path} lists {missing[0]}{more}, not there", "put all shards into its folder")
    return found


def combined(hashes: Mapping[str, str]) -> str:
    """Return one hash for shards, from the sha256 of each by name."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()
