"""What a teacher's attention shows before anything is trained: hypotheses to test, and no findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atdiag.core.text import count

if TYPE_CHECKING:
    from atdiag.analysis.statistics import Stats

IMAGES = 64
"""Images that the statistics are taken over."""

REGISTERS, SINK, UNIFORM, ONE_HOT, ALIKE = 0.5, 0.5, 0.98, 0.1, 0.01
"""From where on a statistic is mentioned: the share of attention on registers, and on the most attended token; the
entropy of a row as a share of that of a uniform one, at least (uniform) and at most (one-hot); the divergence between
heads, in bits. Round numbers to point at known trouble, not thresholds of a test."""


@dataclass(frozen=True)
class Sign:
    """Something that the attention shows, and what it may mean."""

    statistic: str
    layers: tuple[int, ...]
    """The blocks that show it."""
    value: float
    """Mean over these blocks."""
    text: str


def signs(found: Stats) -> list[Sign]:
    """Return the signs of known trouble in attention statistics."""
    heads: Mapping[str, NDArray[np.float64]] = {name: values.mean(1) for name, values in found.heads.items()}
    most = math.log2(found.network.tokens)
    relative = heads["entropy"] / most
    seen = [
        (
            "register_share",
            heads["register_share"] >= REGISTERS,
            heads["register_share"],
            "{share:.0%} of the attention goes to registers, which a student without them is not given",
        ),
        (
            "sink",
            (heads["sink"] >= SINK) & ~(np.nan_to_num(heads["register_share"]) >= REGISTERS),
            heads["sink"],
            "one token takes {share:.0%} of the attention",
        ),
        ("entropy", relative >= UNIFORM, relative, "the maps are nearly uniform ({share:.0%} of the largest entropy)"),
        ("entropy", relative <= ONE_HOT, relative, "the maps are nearly one-hot ({share:.0%} of the largest entropy)"),
        ("redundancy", heads["redundancy"] <= ALIKE, heads["redundancy"], "the heads are nearly alike"),
    ]
    out = []
    for statistic, where, values, text in seen:
        if where.any():
            layers = tuple(found.layers[i] for i in np.flatnonzero(where))
            value = float(values[where].mean())
            out.append(
                Sign(statistic, layers, value, f"{_blocks(layers, len(found.layers))}: {text.format(share=value)}")
            )
    return out


def _blocks(layers: tuple[int, ...], depth: int) -> str:
    if len(layers) == depth:
        return "all blocks"
    return f"{count(len(layers), 'block')} of {depth} ({', '.join(map(str, layers))})"
