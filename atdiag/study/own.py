"""Settings chosen for a user's own teacher and images: what images look like, and how long to train within a time.

A choice is stored beside the runs (``RUNS/choices/KEY.json``) and read again, so that the same line names the same
runs, whatever the speed of the machine then. Imports nothing heavy before it measures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.resources import small_file
from atdiag.core.runs import Store, write_atomically
from atdiag.core.spec import RunSpec
from atdiag.core.text import count, duration
from atdiag.execution import devices, gpus, plan, rate
from atdiag.networks.registry import preprocessing
from atdiag.study import settings as profiles
from atdiag.study.profiles import OWN_PROFILE
from atdiag.study.settings import Settings

Plan = Callable[[Settings], list[RunSpec]]
"""The runs of an experiment under some settings."""

_MOST_EPOCHS = 300
"""Longer trainings are not chosen: DeiT's length."""
_FEW = (10, 4)
"""Epochs of the smaller experiment that is proposed where a budget is too small: the first that fit."""
_PARTS = (1, 2, 3)
"""Its image size: the usual one, or the largest whose grid is that part of the usual grid."""
_FEWEST_IMAGES = 500
"""Training images that such an experiment has at least."""


def suited(settings: Settings, teacher: str, training: bool = True) -> Settings:
    """Return settings with images as a teacher expects them, where the user says nothing else.

    Only at the profile of a user's own images; otherwise the settings are returned unchanged. training: as in
    :func:`atdiag.study.settings.resolve`. Raises UserError for a reference that names no teacher.
    """
    if settings.profile.name != OWN_PROFILE:
        return settings
    view = preprocessing.of(teacher)
    return profiles.choosing(
        settings,
        {
            "data.image_size": view.image_size,
            "data.crop_share": view.crop_share,
            "data.interpolation": view.interpolation,
        },
        training,
    )


# --- a time -> epochs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """A time for all runs of an experiment: on this machine, or on a kind of GPU."""

    seconds: float
    gpu: str | None = None

    @staticmethod
    def parse(text: str | None, gpu: str | None = None) -> Budget | None:
        """Parse ``20m``, ``1.5h``, ``90s`` or ``2d``; None without a text. Raises UserError."""
        if gpu is not None:
            gpus.named(gpu)
        if text is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(s|m|h|d)[a-z]*", text.strip().lower())
        if not found or not float(found[1]):
            raise UserError(f"`budget` {text!r} is not a time", "give a number and a unit, as `budget` 20m or 1.5h")
        return Budget(float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]], gpu)

    def __str__(self) -> str:
        """Format it as typed: ``20m on h100``."""
        unit = next(unit for unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")) if self.seconds >= unit[0])
        return f"{self.seconds / unit[0]:g}{unit[1]}" + (f" on {self.gpu}" if self.gpu else "")


@dataclass(frozen=True)
class Length:
    """A training length that was chosen for a budget."""

    epochs: int
    flops_per_second: float
    """Of a training process, as measured or assumed."""
    seconds: float
    """Estimate for all runs."""
    budget: str
    gpu: str | None
    """The GPU that it is meant for; None: the machine on which it was made."""
    made: str
    """Date and time of the choice."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that follow: epochs, a tenth of them (at most 5) of warm-up, and precision on a GPU."""
        more = {"recipe.precision": "bfloat16"} if self.gpu else {}
        return {"recipe.epochs": self.epochs, "recipe.warmup_epochs": min(5.0, self.epochs / 10)} | more


def within(
    settings: Settings, budget: Budget, planned: Plan, store: Store, options: ExecutionOptions
) -> tuple[Settings, Length]:
    """Return settings with as many epochs as fit a budget, and the choice: the stored one, or a new one.

    For a new one, training is timed for some seconds. Raises UserError if the user sets the epochs, too, or if not one
    epoch fits.
    """
    if options.ranks > 1:
        raise UserError(
            f"`budget` is measured in one process, not over `ranks` {options.ranks}",
            "leave one of them out; `recipe.epochs`=N sets the epochs",
        )
    if given := [name for name in settings.overrides if name.endswith(".epochs")]:
        raise UserError(f"`budget` chooses the epochs, and {given[0]} sets them", "leave one of them out")
    specs = {epochs: planned(_long(settings, epochs, budget)) for epochs in (2, 4)}
    path = store.root / "choices" / f"{_key(specs[2], budget)}.json"
    choice = _stored(path)
    if choice is None:
        choice = _chosen(settings, budget, planned, specs, options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(choice), indent=1))
    return profiles.choosing(settings, choice.settings), choice


def _long(settings: Settings, epochs: int, budget: Budget, more: Mapping[str, Any] | None = None) -> Settings:
    length = Length(epochs, 0, 0, str(budget), budget.gpu, "").settings
    return profiles.choosing(settings, {**length, **(more or {})})


def _key(specs: Sequence[RunSpec], budget: Budget) -> str:
    """Name a choice by all that it depends on, except for the machine."""
    text = " ".join([*sorted(spec.id for spec in specs), str(budget)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored(path: Path) -> Length | None:
    """Read a stored choice; None if there is none. Raises UserError for a file that is no such choice."""
    try:
        return Length(**json.loads(small_file(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"{path} can't be read ({fault})", "remove it, and the length is chosen anew") from None


def _chosen(
    settings: Settings, budget: Budget, planned: Plan, specs: Mapping[int, list[RunSpec]], options: ExecutionOptions
) -> Length:
    if budget.gpu:
        processes = 1
        speed = gpus.speed(budget.gpu, min(spec.network.width for spec in specs[2]))
    else:
        device = devices.resolve(options.device)
        processes = devices.processes_for(device, options.threads)
        speed = rate.measure(specs[2], options)

    def seconds(runs: Sequence[RunSpec]) -> float:
        return plan.estimate(runs, processes, speed)

    short, long = (seconds(specs[epochs]) for epochs in (2, 4))
    each = (long - short) / 2
    rest = short - 2 * each
    epochs = min(_MOST_EPOCHS, int((budget.seconds - rest) / each))
    while epochs > 1 and seconds(planned(_long(settings, epochs, budget))) > budget.seconds:
        epochs -= 1
    if epochs < 1:
        raise _too_little(settings, budget, planned, seconds, rest + each, specs[2])
    taken = seconds(planned(_long(settings, epochs, budget)))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Length(epochs, round(speed), round(taken), str(budget), budget.gpu, now)


def _too_little(
    settings: Settings,
    budget: Budget,
    planned: Plan,
    seconds: Callable[[Sequence[RunSpec]], float],
    needed: float,
    specs: Sequence[RunSpec],
) -> UserError:
    """Return the refusal of a budget for less than one epoch, with fewer or smaller images for which it is enough."""
    network = specs[0].network
    classes, fewer = network.classes, ""
    for epochs, part in product(_FEW, _PARTS):
        size = network.image_size if part == 1 else max(network.grid // part, 1) * network.patch_size

        def spent(images: int, size: int = size, epochs: int = epochs) -> float:
            sizes = {"data.per_class": images, "data.test_per_class": images, "data.image_size": size}
            return seconds(planned(_long(profiles.overriding(settings, sizes), epochs, budget)))

        def sizes(images: int, size: int = size, smaller: bool = part > 1) -> str:
            pixels = f"`data.image_size`={size} " if smaller else ""
            return f"{pixels}`data.per_class`={images} `data.test_per_class`={images}"

        try:
            start, end = spent(100), spent(200)
            images = int(100 + (budget.seconds - start) / (end - start) * 100)
            images = min(images // 10 * 10 if images > 20 else images, specs[0].data.train // classes)
            if images * classes >= _FEWEST_IMAGES and spent(images) <= budget.seconds:
                fewer = f", or add {sizes(images)}, which leaves time for {epochs} epochs"
                break
            images = -(-_FEWEST_IMAGES // classes)
            least = spent(images)
            if least < needed and images * classes <= specs[0].data.train:
                fewer = f", or `budget` {-(-least // 60):.0f}m with {sizes(images)}, for {epochs} epochs"
        except UserError:  # a batch of more images than these, or a size that the user's own settings exclude
            continue
    minutes = -(-needed // 60)
    return UserError(
        f"`budget` {budget} is too little for one epoch of {count(len(specs), 'run')} and their tests "
        f"(about {duration(needed)})",
        f"give `budget` {minutes:.0f}m{fewer}",
    )
