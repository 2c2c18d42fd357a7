"""Draw malformed input with Hypothesis: corruptions of a file's bytes, and values to type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

TYPED = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
"""Any text that a shell can pass."""
NUMBERS = (
    st.integers().map(str) | st.floats().map(str) | st.sampled_from(["0", "-1", "1e9", "6,", ",", "3,3", "٣", "0x6"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("9" * 400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def in_json(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Replace, remove or add a value somewhere in a JSON document."""
    try:
        document = json.loads(content.splitlines()[0] if content.count(b"\n") > 2 and b"\n{" in content else content)
    except ValueError:
        return b"{}"
    here = document
    while True:
        name = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[name], dict | list) and here[name] and draw(st.integers(0, 3)):
            here = here[name]
            continue
        how = draw(st.sampled_from(["value", "value", "delete", "add"]))
        if how == "value":
            here[name] = draw(VALUES)
        elif how == "delete":
            del here[name]
        elif isinstance(here, dict):
            here[draw(st.text(max_size=5))] = draw(VALUES)
        else:
            here.append(draw(VALUES))
        return json.dumps(document).encode()


def corrupted(content: bytes, draw: Callable[[Any], Any], document: bool = False) -> tuple[bytes | None, str]:
    """Corrupt a file's content (None: the file is deleted), and describe how."""
    ways = ["flips", "flips", "cut", "inserted", "replaced", "empty", "gone", *(["value"] * 6 if document else [])]
    how = draw(st.sampled_from(ways))
    place = st.integers(0, max(len(content) - 1, 0))
    if how == "flips":
        out = bytearray(content)
        # Half of the flips hit the beginning, where files declare their format.
        near = st.integers(0, min(255, max(len(content) - 1, 0)))
        for where in draw(st.lists(place | near, min_size=1, max_size=4)):
            out[where] ^= 1 << draw(st.integers(0, 7))
        return bytes(out), how
    if how == "cut":
        return content[: draw(place)], how
    if how == "inserted":
        at = draw(place)
        return content[:at] + draw(st.binary(min_size=1, max_size=40)) + content[at:], how
    if how == "replaced":
        return draw(st.binary(max_size=200)), how
    if how == "value":
        return in_json(content, draw), how
    return (b"", how) if how == "empty" else (None, how)


def spoil(path: Path, draw: Callable[[Any], Any], document: bool = False) -> tuple[str, bool]:
    """Corrupt a file; return a description, and whether anything changed."""
    before = path.read_bytes()
    after, how = corrupted(before, draw, document)
    path.unlink() if after is None else path.write_bytes(after)
    return f"{how} in {path.name}", after != before
