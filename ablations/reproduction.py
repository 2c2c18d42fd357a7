"""Combinations of each ablation's options for ``atdiag reproduce``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any


def combinations(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of the varied options.

    >>> combinations({"module": ("mlp", "attn"), "teacher": "clip_b"})
    [{'module': 'mlp', 'teacher': 'clip_b'}, {'module': 'attn', 'teacher': 'clip_b'}]
    """
    values = [value if isinstance(value, tuple) else (value,) for value in options.values()]
    return [dict(zip(options, chosen, strict=True)) for chosen in product(*values)]
