"""What a diagnosis can accuse: null hypotheses about contrasts of arms, and how they share a level.

An accusation is made by rejecting its null hypothesis, so it is a claim with an error rate; not to accuse is none. A
hypothesis with several parts is rejected only if every part is (an intersection-union test: Berger, Technometrics 24
(1982)), at the same level.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from atdiag.stats.sequential import Graph
from atdiag.study.protocol import BASELINE

MARGIN = 4.0
"""Default margin in points within which effects count as none: twice the half-width that five seeds reach at mini."""

HEAVIER, LIGHTER = 10.0, 0.1
"""Factors of the loss's weight in the arms that ask about the loss."""


@dataclass(frozen=True)
class Part:
    """One inequality: the contrast of these arms is above (below) the bound, in points. Its opposite is the null."""

    weights: Mapping[str, float]
    side: Literal["above", "below"]
    bound: float = 0.0


@dataclass(frozen=True)
class Hypothesis:
    """A null hypothesis, and what its rejection accuses."""

    name: str
    accuses: str
    """What is said if it is rejected, as a clause."""
    parts: tuple[Part, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""
        return tuple(dict.fromkeys(arm for part in self.parts for arm in part.weights))


@dataclass(frozen=True)
class Names:
    """The names of the arms of one transfer."""

    transfer: str
    components: tuple[str, ...]
    """The teacher's native components that can matter under the transfer."""

    @property
    def standard(self) -> str:
        """The standard student with transfer."""
        return f"standard + {self.transfer}"

    @property
    def native(self) -> str:
        """The native student with transfer: the standard one where the teacher has no component that matters."""
        return f"native + {self.transfer}" if self.components else self.standard

    @property
    def control(self) -> str:
        """The native student from scratch."""
        return "native, scratch" if self.components else BASELINE

    @property
    def averaged(self) -> str:
        """The native student given the maps' average over images: what is left without the image."""
        return f"{self.native}, averaged maps"

    @property
    def singles(self) -> tuple[str, ...]:
        """The student with each of the components alone, and transfer."""
        return tuple(self.given([name]) for name in self.components)

    def given(self, components: Iterable[str]) -> str:
        """Return the name of the student with some of the components, and transfer."""
        wanted = set(components)
        chosen = tuple(name for name in self.components if name in wanted)
        if not chosen:
            return self.standard
        return self.native if chosen == self.components else f"{', '.join(chosen)} + {self.transfer}"

    def blocks(self, layers: range) -> str:
        """Return the name of the standard student with transfer in some blocks."""
        return f"{self.transfer}, {blocks_named(layers)}"

    def weighted(self, factor: float) -> str:
        """Return the name of the standard student with another weight of the loss."""
        return f"{self.transfer}, weight x{factor:g}"


COPIED = "standard + copy"
REINIT = {"attention": "reinit mlp", "MLPs": "reinit attn"}
"""What of the teacher's weights a student begins with -> the arm, which is named by what is drawn anew."""


@dataclass(frozen=True)
class Outline:
    """What can be asked about a teacher under a transfer."""

    transfer: Literal["copy", "distill"]
    components: tuple[str, ...]
    """Its native components that can matter under the transfer."""
    depth: int
    margin: float = MARGIN
    start: bool = True
    """Whether a standard student can begin with its weights."""
    not_asked: Mapping[str, str] = field(default_factory=dict)
    """What is not asked, and why."""

    @property
    def names(self) -> Names:
        """The names of the arms."""
        return Names(self.transfer, self.components)

    @property
    def first(self) -> tuple[str, ...]:
        """The arms that are asked for first: whether the transfers help."""
        return BASELINE, "standard + copy", "standard + distill"

    @property
    def halves(self) -> tuple[range, range]:
        """The lower and the upper half of the blocks."""
        return _split(range(self.depth))

    @property
    def families(self) -> tuple[tuple[Hypothesis, ...], ...]:
        """The accusations: families of hypotheses that begin with a share of the level each."""
        n = self.names
        maps = Hypothesis(
            "the maps",
            f"what the teacher's maps say of an image is worth less than {self.margin:g} points to a student that "
            "can take all of them",
            (Part({n.native: 1, n.averaged: -1}, "below", self.margin),),
        )
        out: list[tuple[Hypothesis, ...]] = [(maps,)]
        if self.components:
            both = {n.native: 1.0, n.control: -1.0, n.standard: -1.0, BASELINE: 1.0}
            said = "the transfer is worth more to a student with the teacher's native components"
            out.append((Hypothesis("the architecture", said, (Part(both, "above"),)),))
        if self.start:
            out.append(
                tuple(
                    Hypothesis(
                        f"the start ({what})",
                        f"a student that begins with the teacher's {what} ends below scratch",
                        (Part({arm: 1, BASELINE: -1}, "below"),),
                    )
                    for what, arm in REINIT.items()
                )
            )
        if self.depth >= 2:
            out.append(self._worse(*self.halves))
        if self.transfer == "distill":
            weights = {n.weighted(HEAVIER): 1.0, n.weighted(LIGHTER): -1.0}
            out.append(
                (
                    Hypothesis(
                        "the loss",
                        "a student gains from the copied maps, and loses with the weight of the loss",
                        (Part(weights, "below"), Part({COPIED: 1, BASELINE: -1}, "above")),
                    ),
                )
            )
        return tuple(out)

    def _worse(self, one: range, other: range) -> tuple[Hypothesis, ...]:
        """Return the hypotheses that of two parts one hurts, and more than the other."""
        n = self.names
        return tuple(
            Hypothesis(
                blocks_named(a),
                f"the attention of {blocks_named(a)} alone hurts, and more than that of {blocks_named(b)}",
                (
                    Part({n.blocks(a): 1, n.blocks(b): -1}, "below"),
                    Part({n.blocks(a): 1, BASELINE: -1}, "below"),
                ),
            )
            for a, b in ((one, other), (other, one))
        )

    @property
    def follow_ups(self) -> dict[str, tuple[Hypothesis, ...]]:
        """The name of an accusation -> the hypotheses that are asked only once it is made."""
        n = self.names
        out: dict[str, tuple[Hypothesis, ...]] = {}
        if len(self.components) > 1:
            out["the architecture"] = tuple(
                Hypothesis(
                    f"component {name}",
                    f"{name} alone makes the transfer worth more",
                    (Part({n.given([name]): 1, n.standard: -1}, "above"),),
                )
                for name in self.components
            )
        if self.depth >= 2:
            parts = [part for half in self.halves for part in bisected(half)]
            out |= {blocks_named(part): self._worse(*_split(part)) for part in parts}
        return out

    @property
    def parts(self) -> dict[str, range]:
        """All parts of the blocks that can be accused, by the name of the accusation."""
        every = [part for layers in bisected(range(self.depth)) for part in _split(layers)]
        return {blocks_named(part): part for part in every}

    @property
    def longest_way(self) -> tuple[str, ...]:
        """The parts that one bisection asks about, at most: both halves, of one of them both halves, and so on."""
        out: list[str] = []
        left = range(self.depth)
        while len(left) >= 2:
            halves = _split(left)
            out += map(blocks_named, halves)
            left = halves[1]  # never the smaller one
        return tuple(out)

    @property
    def hypotheses(self) -> dict[str, Hypothesis]:
        """All hypotheses by name."""
        every = [*self.families, *self.follow_ups.values()]
        return {one.name: one for some in every for one in some}

    @property
    def graph(self) -> Graph:
        """How the hypotheses share a level: families equally, and equally within each.

        An accusation passes its share on to all others, but for those that open further questions: a rejected
        architecture passes it to the single components, and rejected blocks pass it to their own two halves.
        """
        families = self.families
        shares = {one.name: 1 / len(families) / len(some) for some in families for one in some}
        edges: dict[str, Mapping[str, float]] = {}
        opened = {name: [one.name for one in some] for name, some in self.follow_ups.items()}
        for names in (list(shares), *opened.values()):
            shares = dict.fromkeys(names, 0.0) | shares
            edges |= {name: _equally(opened.get(name) or [o for o in names if o != name]) for name in names}
        return Graph(shares, edges)


def blocks_named(layers: range) -> str:
    """Return what some blocks are called: ``block 4``, ``blocks 0-5``."""
    first, last = layers.start, layers.stop - 1
    return f"block {first}" if first == last else f"blocks {first}-{last}"


def bisected(layers: range) -> list[range]:
    """Return the range and all parts of two blocks or more that halving it again and again gives."""
    return [] if len(layers) < 2 else [layers, *(part for half in _split(layers) for part in bisected(half))]


def _split(layers: range) -> tuple[range, range]:
    middle = layers.start + len(layers) // 2
    return range(layers.start, middle), range(middle, layers.stop)


def _equally(names: Sequence[str]) -> dict[str, float]:
    return {name: 1 / len(names) for name in names}
