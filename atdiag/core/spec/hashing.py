"""The content hash that names a run, and the fields it excludes. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
from typing import Any

SEMANTICS = 1
"""Incremented when the *meaning* of a spec changes (for example a fixed bug in a loss). Contrasts refuse to mix
values."""

NOT_HASHED: frozenset[str] = frozenset({"teacher.name", "teacher.profile"})
"""Fields that record the name by which a thing was requested, not what it is (a teacher *is* its network and
weights)."""

ADDED_FIELDS: dict[str, Any] = {
    "network.differences": [],
    "teacher.network.differences": [],
    "teacher.branch": "weights",
    "init.head_rows": [],
    "init.probe": False,
    "transfer.teacher_layers": [],
    "transfer.tensor": "map",
    "transfer.heads": None,
    "transfer.teacher_heads": None,
    "transfer.different_heads": None,
    "transfer.average": None,
    "transfer.reduce": "sum",
    "transfer.temperature": None,
    "transfer.shared_drop_path": False,
    **dict.fromkeys(("data.image_size", "data.per_class", "data.test_per_class", "data.fingerprint")),
    "data.test_draw": 0,
    "data.validation": None,
    "data.split": None,
    "data.split_seed": 0,
    "data.crop_share": None,
    "data.interpolation": "bicubic",
    "data.turns": 0,
    "recipe.crop": None,
    "recipe.flip": False,
    "recipe.erase": 0.0,
    "recipe.ema": None,
    "recipe.branch_warmup": 0.0,
    "teacher.operation": None,
    "planted": None,
    "network.values": [],
    "teacher.network.values": [],
    "masked": None,
    "masked.pixels": "of patch",
    "masked.positions": "learned",
    "recipe.layer_decay": None,
    "recipe.cosine_after_warmup": False,
    "start": None,
}
"""Fields added since version 1 -> the value under which nothing changed. A spec with that value hashes as if the field
did not exist, so old runs stay finished. Frozen: only add rows, never edit them."""


def content_hash(
    document: dict[str, Any], *, added: dict[str, Any] = ADDED_FIELDS, ignored: frozenset[str] = NOT_HASHED
) -> str:
    """Hash ``document``'s canonical JSON (sha256), without ``ignored`` fields and ``added`` ones at their old value.

    Fields are named by dotted paths. Key order and white space do not matter.

    >>> content_hash({"a": 1, "b": {"c": 2}}) == content_hash({"b": {"c": 2}, "a": 1})
    True
    >>> content_hash({"a": 1, "new": 0}, added={"new": 0}) == content_hash({"a": 1})
    True
    """

    def kept(node: Any, path: str) -> Any:
        if not isinstance(node, dict):
            return node
        out = {}
        for key, value in node.items():
            here = f"{path}.{key}" if path else key
            if here in ignored or (here in added and added[here] == value):
                continue
            out[key] = kept(value, here)
        return out

    text = json.dumps(kept(document, ""), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
