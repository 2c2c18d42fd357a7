"""What does a transfer cost? Activations that pass for each image, and a step's time and memory beside plain training.

Li et al. 2024 count the activations in two ways, as maps and as the queries and keys that make them, and find that
attention transfer costs about what distilling the logits does (ViT-L, batch 16). The counts follow from the
architectures alone; time and memory are measured here, with random weights, on which they do not depend.

This is no experiment with arms and seeds: what varies is the machine, so intervals are over repeats on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ablations import claims, gains
from atdiag.core.errors import UserError
from atdiag.core.spec import RunSpec, Teacher
from atdiag.data import sources
from atdiag.execution import cost
from atdiag.stats.paired import FEWEST_REPEATS, Median, median_interval
from atdiag.study.builder import Lab
from atdiag.study.claims import Judged, Verdict
from atdiag.study.protocol import BASELINE

if TYPE_CHECKING:
    from collections.abc import Callable

KD = "logits"
METHODS = ("finetune", KD, "copy", "distill")
_ATTENTION = ("copy", "distill")

TEACHERS = {"paper": "mae_l"}
BATCHES = {"paper": 16}
"""Where these differ from DeiT-S and the batch of the profile's recipe: as in the paper."""
REPEATS = 21
ABOUT = (0.8, 1.25)
"""Costs whose ratio lies between these are about equal: the limits that are usual for bioequivalence (FDA 2001)."""
PATIENCE = 600.0
"""Estimated seconds beyond which nothing is measured unless it was asked for."""
_PROCESS = 5.0
"""Seconds in which a process that measures memory starts."""


@dataclass(frozen=True)
class Costs:
    """What each method transfers, and what a step of it costs on one machine."""

    specs: Mapping[str, RunSpec]
    """By method, the baseline first; their batch is that of a step."""
    seconds: Mapping[str, list[float]] = field(default_factory=dict)
    """Of a step by method and round; empty: not measured."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """MiB that a step needs above the resident networks; empty: not measured."""
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """The images of a step."""
        return self.specs[BASELINE].recipe.batch_size

    @property
    def teacher(self) -> Teacher:
        """The teacher of the arms that copy and distill."""
        teacher = self.specs["copy"].teacher
        assert teacher is not None
        return teacher

    def time_of(self, method: str, than: str = BASELINE) -> Median:
        """Return the time of a method's step as a multiple of another's: the median of the rounds' ratios."""
        return median_interval([a / b for a, b in zip(self.seconds[method], self.seconds[than], strict=True)])

    def memory_of(self, method: str, than: str = BASELINE) -> float | None:
        """Return the memory of a method's step as a multiple of another's; None if it was not measured."""
        return self.memory[method] / self.memory[than] if self.memory else None


def planned(lab: Lab, teacher: str | None = None, batch: int | None = None) -> Costs:
    """Return what each method transfers from a teacher, whose weights are not needed. Nothing is measured.

    The logits are those of a teacher with a head for the data set's classes, as it has after fine-tuning. Raises
    UserError for an unknown teacher, and for settings with which a step can't be measured.
    """
    profile = lab.settings.profile
    name = TEACHERS.get(profile.name, "deit_s") if teacher is None else teacher
    if not name:
        raise UserError("`teacher` is empty", f"name one, such as {TEACHERS.get(profile.name, 'deit_s')}")
    if batch is not None and "recipe.batch_size" in lab.settings.overrides:
        raise UserError("`batch` and `recipe.batch_size` both say how many images a step has", "leave one of them out")
    if "," in name or name == "all":
        raise UserError(f"`teacher` {name}: costs are those of one teacher", "name one")
    if profile.transfer.average == "examples" or profile.transfer.different_heads is not None:
        raise UserError(
            "`transfer.average` examples and `transfer.different_heads` need the teacher's weights", "leave them out"
        )
    study = gains.study(lab, "cost", name, ("finetune", *_ATTENTION))
    specs = {arm.name: arm.specs[0] for arm in study.arms}
    source, student = study.teacher, specs["copy"].network
    headed = source.network.model_copy(update={"classes": sources.find(profile.data).classes})
    kd = RunSpec(
        network=student,
        teacher=source.model_copy(update={"network": headed}),
        transfer=lab.transfer(KD, student, allowed=(KD,)),
        data=profile.data,
        recipe=profile.recipe["distill"],
        seed=lab.settings.seeds[0],
    )
    size = BATCHES.get(profile.name, kd.recipe.batch_size) if batch is None else batch
    if size < 1:
        raise UserError(f"`batch` {size} is no number of images", "give one or more")
    return Costs({name: _at(kd if name == KD else specs[name], size) for name in (BASELINE, *METHODS)})


def _at(spec: RunSpec, batch: int) -> RunSpec:
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"batch_size": batch})})


def step(spec: RunSpec) -> str:
    """Return what one step trains: everything on which its cost depends but the machine (a ``StepOf``, as JSON)."""
    shown = spec.teacher if spec.transfer.method != "none" else None
    parts = {
        "network": spec.network.model_dump(mode="json"),
        "teacher": None if shown is None else shown.network.model_dump(mode="json"),
        "transfer": spec.transfer.model_dump(mode="json"),
        "batch": spec.recipe.batch_size,
    }
    return json.dumps(parts)


def seconds_needed(costs: Costs, repeats: int, flops_per_second: float) -> float:
    """Estimate how long measuring takes: all rounds, and the two steps that measure memory."""
    steps = sum(cost.step_seconds(spec, costs.batch, flops_per_second) for spec in costs.specs.values())
    return (repeats + 4) * steps + _PROCESS * len(costs.specs)


def check_repeats(repeats: int) -> None:
    """Raise UserError for too few rounds for an interval."""
    if repeats < FEWEST_REPEATS:
        raise UserError(
            f"`repeats` {repeats}: too few for an interval of a median",
            f"give {FEWEST_REPEATS} or more, or 0 to count only",
        )


def measured(
    costs: Costs,
    device: str,
    threads: int | None,
    repeats: int = REPEATS,
    on_step: Callable[[int, int], None] | None = None,
) -> Costs:
    """Measure a step's time and memory by method on a device, methods in turns. on_step: callback (done, total).

    Raises UserError for too few repeats, and for a batch that does not fit.
    """
    check_repeats(repeats)
    import torch

    from atdiag.training import steps
    from atdiag.training.provenance import environment

    at, before = torch.device(device), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    total = repeats + len(costs.specs)
    tell = on_step or (lambda done, total: None)
    try:
        each = {name: steps.StepOf.model_validate_json(step(spec)) for name, spec in costs.specs.items()}
        used = {}
        for done, (name, one) in enumerate(each.items()):
            tell(done, total)
            used[name] = steps.memory(one, at)
        made = {name: one.made(at) for name, one in each.items()}
        seconds = steps.in_turns(made, repeats, at, lambda done: tell(len(costs.specs) + done, total))
        machine = environment(at)
    except torch.OutOfMemoryError:
        raise UserError(f"a step of {costs.batch} images does not fit on {device}", "give a smaller `batch`") from None
    finally:
        torch.set_num_threads(before)
    memory = {name: value for name, value in used.items() if value is not None}
    return Costs(costs.specs, seconds, memory, machine)


def findings(costs: Costs) -> list[Judged]:
    """Judge whether attention transfer costs about what distilling the logits does."""
    return [as_kd(costs)]


def as_kd(costs: Costs) -> Judged:
    """Judge whether time and memory of copying and of distilling maps are about those of distilling logits.

    "About" is a ratio within :data:`ABOUT`. The claim holds if each ratio of memories, and the whole interval of each
    ratio of times, lies within; it does not hold if one lies wholly outside; everything else is undecided.
    """
    claim = claims.stated("cost", "attention transfer costs what KD does")
    if not costs.seconds:
        return Judged(claim, "not testable here", "", note="not measured on this machine")
    times = [costs.time_of(name, KD) for name in _ATTENTION]
    spans = [(one.low, one.high) for one in times]
    memories = [one for name in _ATTENTION if (one := costs.memory_of(name, KD)) is not None]
    spans += [(one, one) for one in memories]
    low, high = ABOUT
    out = any(below > high or above < low for below, above in spans)
    within = all(low <= below and above <= high for below, above in spans)
    word: Verdict = "does not hold" if out else "holds" if within else "undecided"
    said = [
        f"{name} {one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for name, one in zip(_ATTENTION, times, strict=True)
    ]
    ours = f"time of KD's: {', '.join(said)}"
    if memories:
        ours += f"; memory: {', '.join(f'{n} {one:.2f}' for n, one in zip(_ATTENTION, memories, strict=True))}"
    note = f"one machine, {times[0].repeats} rounds, batch {costs.batch}"
    return Judged(claim, word, ours, note=note if memories else f"{note}; memory can't be measured here")
