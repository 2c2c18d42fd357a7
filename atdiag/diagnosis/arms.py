"""The arms that a diagnosis asks about, by name: those of the ablations, so that their runs are shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, cast

from ablations.reinit import MODULES
from atdiag.core.errors import UserError
from atdiag.core.selection import choose
from atdiag.core.spec import Init, Network, RunSpec, Teacher, Transfer
from atdiag.diagnosis.hypotheses import REINIT, Outline
from atdiag.networks.model.acting import why_idle
from atdiag.networks.registry.sizes import differing
from atdiag.study import aggregate, chance
from atdiag.study.builder import Lab
from atdiag.study.protocol import BASELINE, METHODS, Arm, Footing

if TYPE_CHECKING:
    from atdiag.core.runs import Store
    from atdiag.stats.contrasts import Outcomes

Train = Callable[[Sequence[RunSpec]], None]
"""Trains runs to completion; finished ones cost nothing."""


@dataclass(frozen=True)
class Case:
    """A teacher to be diagnosed, and everything that can be trained with it."""

    lab: Lab
    """With all seeds that a diagnosis may need."""
    teacher: Teacher
    transfer: Literal["copy", "distill"]
    margin: float

    @property
    def own(self) -> tuple[str, ...]:
        """The native components that a student can be given; none where the teacher has more than a student can."""
        network = self.teacher.network
        return () if network.differences else network.components

    @property
    def smaller_than(self) -> int | None:
        """The image size that the teacher was trained at, if it sees smaller images here; None if not, or not known."""
        settings = self.lab.settings
        trained, here = settings.chosen.get("data.image_size"), settings.profile.data.image_size
        return trained if trained is not None and here is not None and here < trained else None

    @cached_property
    def idle(self) -> Mapping[str, str]:
        """The native components that can't matter under the transfer -> why."""
        passed = self.lab.transfer(self.transfer, self._standard)
        native = self.lab.student(self.teacher, self.own)
        return {name: why for name in self.own if (why := why_idle(name, passed, native))}

    @property
    def outline(self) -> Outline:
        """What can be asked about the teacher."""
        network = self.teacher.network
        differences = network.differences
        components = tuple(name for name in self.own if name not in self.idle)
        why: dict[str, str] = {}
        if differences:
            lacks = f"no student can be given {', '.join(differences)}"
            why = {"the architecture": lacks, "the start": lacks}
        elif not components:
            said = "; ".join(f"{name}: {reason}" for name, reason in self.idle.items())
            why = {"the architecture": said or f"{self.teacher.label} has no native component"}
        other = differing(self._standard, network)
        start = not differences and not other
        if not differences and other:
            told = ", ".join(f"{name} {ours} for {theirs}" for name, ours, theirs in other)
            why["the start"] = f"no weights pass to a student of another size ({told})"
        if self.transfer == "copy":
            why["the loss"] = "copying has no loss: give `transfer` distill"
        return Outline(
            transfer=self.transfer,
            components=components,
            depth=self._standard.depth,
            margin=self.margin,
            start=start,
            not_asked=why,
        )

    @cached_property
    def _standard(self) -> Network:
        return self.lab.student(self.teacher)

    def arm(self, name: str) -> Arm:
        """Return an arm by its name in :class:`~atdiag.diagnosis.hypotheses.Names`, over all seeds of the lab."""
        lab, names = self.lab, self.outline.names
        if name == BASELINE:
            return lab.baseline(self.teacher)
        if name == names.control:
            return lab.arm(name, lab.student(self.teacher, self.own))
        for arm in REINIT.values():
            if name == arm:
                init = Init(source="teacher", reinit=MODULES[arm.removeprefix("reinit ")])
                return lab.arm(name, self._standard, self.teacher, init)
        network, passed = self._transferred(name)
        return lab.arm(name, network, self.teacher, transfer=passed)

    def _transferred(self, name: str) -> tuple[Network, Transfer]:
        """Return the student and the transfer of an arm with a transfer."""
        lab, names, method = self.lab, self.outline.names, self.transfer
        for other in METHODS:
            if name == f"standard + {other}":
                return self._standard, lab.transfer(other, self._standard)
        if name == names.averaged:
            native = self.student(names.components)
            return native, lab.under("transfer.average", "examples").transfer(method, native)
        if blocks := re.fullmatch(rf"{method}, blocks? (\d+)(?:-(\d+))?", name):
            first, last = int(blocks[1]), int(blocks[2] or blocks[1])
            return self._standard, lab.transfer(method, self._standard, range(first, last + 1))
        kind, _, factor = name.partition(", weight x")
        if kind == method and factor:
            usual = lab.transfer(method, self._standard).weight or 0.0
            weighted = lab.under("transfer.weight", usual * float(factor))
            return self._standard, weighted.transfer(method, self._standard)
        chosen = names.components if name == names.native else name.removesuffix(f" + {method}").split(", ")
        network = self.student(chosen)
        return network, lab.transfer(method, network)

    def student(self, components: Sequence[str]) -> Network:
        """Return the student with some of the components that can matter.

        Idle ones come along where ``rescue`` has them too (all, or all but one), for then both share their runs.
        """
        acting = self.outline.components
        if set(components) == set(acting):
            return self.lab.student(self.teacher, self.own)
        beside = self.idle if len(components) > 1 else ()
        return self.lab.student(self.teacher, [name for name in self.own if name in components or name in beside])

    @cached_property
    def reference(self) -> Arm | None:
        """The teacher itself, evaluated; None if its head is for another task."""
        return self.lab.reference(self.teacher)


@dataclass(frozen=True)
class Runs:
    """The answers of a case's arms, from run directories; what is missing there is trained first."""

    case: Case
    store: Store
    train: Train
    asked: dict[str, set[int]] = field(default_factory=dict)
    """The arms that were asked about so far, with their seeds."""

    def answers(self, arms: Sequence[str], seeds: Iterable[int]) -> dict[str, Outcomes]:
        """Return the outcomes of some arms with some of the lab's seeds, counted from 0."""
        seeds = list(seeds)
        self.train(list({spec.id: spec for name in arms for spec in self.specs(name, seeds)}.values()))
        for name in arms:
            self.asked.setdefault(name, set()).update(seeds)
        return {name: self.stored(name, seeds) for name in arms}

    def specs(self, name: str, seeds: Iterable[int]) -> tuple[RunSpec, ...]:
        """Return the runs of an arm with some seeds."""
        every = self.case.arm(name).specs
        return tuple(every[seed] for seed in sorted(seeds))

    def stored(self, name: str, seeds: Iterable[int]) -> Outcomes:
        """Return the outcomes of an arm's finished runs."""
        return aggregate.answered(Arm(name, self.specs(name, seeds)), self.store).outcomes

    def teacher(self) -> float | None:
        """Return the teacher's own accuracy in per cent; None if its head is for another task."""
        reference = self.case.reference
        if reference is None:
            return None
        self.train(list(reference.specs))
        (right,) = aggregate.answered(reference, self.store).outcomes.correct.values()
        return 100 * float(right.mean())

    def footing(self, scratch: Outcomes) -> Footing:
        """Return how far a baseline is above chance."""
        labels = aggregate.answered(Arm(BASELINE, self.specs(BASELINE, [0])), self.store).labels
        return chance.footing(scratch, labels, self.teacher())


def case(lab: Lab, name: str, transfer: str, margin: float) -> Case:
    """Return the case of a diagnosis by its teacher's name.

    Raises UserError for an unknown teacher or transfer, a margin that is none, and a teacher that can't teach.
    """
    chosen = cast(Literal["copy", "distill"], choose(transfer, METHODS, "transfer"))
    if not 0 < margin < 100:
        raise UserError(f"`margin` {margin:g} is not a margin", "give points between 0 and 100, such as 4")
    lab = lab.suited(name)
    found = Case(lab, lab.teacher(name), chosen, margin)
    found.arm(found.outline.names.standard)  # a transfer that this teacher does not allow is refused here
    return found
