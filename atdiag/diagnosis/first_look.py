"""What a teacher and its images show before anything is trained: facts, and hypotheses to test, but no findings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from atdiag.core.selection import ranges
from atdiag.core.text import count, listed

if TYPE_CHECKING:
    from atdiag.analysis.statistics import Stats
    from atdiag.analysis.subjects import Subject
    from atdiag.core.spec import Data
    from atdiag.diagnosis.arms import Case

IMAGES = 64
"""Images that the statistics are taken over."""

TRAIN_IMAGES, TEST_IMAGES = 2000, 500
"""Images that the nearest neighbours are found among and for, at most."""

SIDE = 32
"""Pixels on a side to which larger images are averaged for that: 2,000 of 224 px would take gigabytes."""

REGISTERS, SINK, UNIFORM, ONE_HOT, ALIKE, SHUT = 0.5, 0.5, 0.98, 0.1, 0.01, 0.01
"""From where on a statistic is mentioned: the share of attention on registers, and on the most attended token; the
entropy of a row as a share of that of a uniform one, at least (uniform) and at most (one-hot); the divergence between
heads, in bits; the gain of an attention branch, at most. Round numbers to point at known trouble, not thresholds of a
test."""


@dataclass(frozen=True)
class Sign:
    """Something that the attention shows, and what it may mean."""

    statistic: str
    layers: tuple[int, ...]
    """The blocks that show it."""
    value: float
    """Mean over these blocks."""
    text: str


@dataclass(frozen=True)
class FirstLook:
    """What is seen before training."""

    facts: tuple[str, ...]
    """The teacher's size and tokens, its native components, and accuracies that need no training."""
    neighbour: float
    """Accuracy in per cent of the nearest training image by pixels."""
    signs: tuple[Sign, ...]


def look(case: Case, subject: Subject, teacher: float | None) -> FirstLook:
    """Look at a case's teacher and images.

    subject: the teacher as a subject of analysis. teacher: its own accuracy in per cent, None if its head is for
    another task. Raises UserError for images that can't be read.
    """
    from atdiag.analysis import images, statistics
    from atdiag.hooks.branches import branch_gains

    data = case.lab.settings.profile.data
    some = images.choose(IMAGES, data, subject.network)
    (found,) = statistics.attention_stats([subject], some)
    neighbour, chance = nearest_neighbour(data)
    own = "its head is for another task" if teacher is None else f"itself {teacher:.1f} %"
    accuracy = f"{own}, nearest neighbour by pixels {neighbour:.1f} %, chance {chance:.1f} %"
    facts = (_network(case), _components(case), accuracy)
    return FirstLook(facts, neighbour, tuple(signs(found, branch_gains(subject, some))))


def _network(case: Case) -> str:
    network, trained = case.teacher.network, case.smaller_than
    special = [*(["a class token"] if network.class_token else [])]
    special += [count(network.registers, "register")] if network.registers else []
    patches = f"{network.grid} x {network.grid} patches of {network.patch_size} px at {network.image_size} px"
    return (
        f"{count(network.depth, 'block')} of width {network.width} with {count(network.heads, 'head')}; "
        f"{count(network.tokens, 'token')}: {listed([*special, patches])}"
        f"{'' if trained is None else f' (it was trained at {trained} px)'}"
    )


def _components(case: Case) -> str:
    acting, idle, beyond = case.outline.components, case.idle, case.teacher.network.differences
    if beyond:
        return f"components that no student can be given: {listed(beyond)}"
    if not case.own:
        return "no native component: the standard student is the native one"
    out = f"native components that can matter to {case.transfer}: {listed(acting) if acting else 'none'}"
    return out + "".join(f"; {name} can't ({why})" for name, why in idle.items())


def nearest_neighbour(data: Data) -> tuple[float, float]:
    """Return the accuracy of the nearest training image by pixels (cosine similarity), and chance, both in per cent.

    Over at most :data:`TRAIN_IMAGES` and :data:`TEST_IMAGES` images, evenly spaced; chance over all test images. Raises
    UserError for images that can't be read.
    """
    import torch

    from atdiag.analysis import images
    from atdiag.data import sources
    from atdiag.training import classifiers

    data_set = sources.find(data)
    train, test = data_set.train_split(data, 0), data_set.test_split(data)
    pixels, labels = [], []
    for split, most in ((train, TRAIN_IMAGES), (test, TEST_IMAGES)):
        rows = images.spread(min(most, len(split)), len(split))
        small = [
            torch.nn.functional.adaptive_avg_pool2d(batch.pixels, min(SIDE, batch.pixels.shape[-1])).flatten(1)
            for batch in images.of_split(data, split, rows).batches(256)
        ]
        pixels.append(torch.cat(small))
        labels.append(torch.from_numpy(split.labels[rows]))
    middle = pixels[0].mean(0)
    number = int(max(one.max() for one in labels)) + 1
    found = classifiers.neighbours(pixels[0] - middle, labels[0], pixels[1] - middle, number, k=1)
    return 100 * float((found == labels[1]).double().mean()), 100 * float(np.bincount(test.labels).max() / len(test))


def signs(found: Stats, gains: NDArray[np.float64]) -> list[Sign]:
    """Return the signs of known trouble in attention statistics, and in the gains of the attention branches [L]."""
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
        (
            "gain",
            np.nan_to_num(gains, nan=np.inf) <= SHUT,
            gains,
            "the attention branch adds {share:.2%} of the stream's norm, so its maps may be noise",
        ),
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
    return f"{count(len(layers), 'block')} of {depth} ({ranges(layers).replace(',', ', ')})"
