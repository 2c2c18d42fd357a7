"""Sessions: settings, store and device; subjects and images for analyses. What a command and a call in Python share.

Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core import paths
from atdiag.core.errors import UserError, suggest
from atdiag.core.options import ExecutionOptions
from atdiag.reports import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from torch import nn

    from atdiag.analysis.images import ImageSet
    from atdiag.analysis.subjects import Subject
    from atdiag.core.runs import Store
    from atdiag.core.spec import RunSpec
    from atdiag.execution.executor import Executor
    from atdiag.execution.plan import Plan
    from atdiag.networks.weights.classes import HeadRows
    from atdiag.reports.notebook import NotebookBar
    from atdiag.study.own import Length
    from atdiag.study.protocol import Reading, Series
    from atdiag.study.settings import Settings


def resolve(given_data_dir: Path | None = None, **given: Any) -> Settings:
    """Resolve settings from options as typed, and set the folders of data and runs that they name.

    Raises UserError for any invalid setting.
    """
    from atdiag.study import settings as profiles

    if given_data_dir is not None and not given_data_dir.expanduser().is_dir():
        raise UserError(f"`data_dir` {given_data_dir} is not a folder", "give the folder that holds the data sets")
    settings = profiles.resolve(data_dir=given_data_dir, **given)
    if settings.data_dir is not None:
        paths.look_in(settings.data_dir)
    paths.runs_are_in(settings.runs)
    return settings


def execution_options(given: Mapping[str, Any]) -> ExecutionOptions:
    """Return the execution options among the given options."""
    named = {field.name for field in fields(ExecutionOptions)}
    values = {name: value for name, value in given.items() if name in named}
    if values.get("data_dir") is not None:
        values["data_dir"] = str(values["data_dir"])
    return ExecutionOptions(**values)


@dataclass(frozen=True)
class ExperimentSession:
    """Context of an experiment: resolved settings, the store of runs, and execution options."""

    settings: Settings
    store: Store
    options: ExecutionOptions
    equivalence: float | None = None
    choice: Length | None = None
    """The training length chosen for a budget."""
    gpu: str | None = None
    """The kind of GPU that plans are for; None: what the options and this machine say."""
    executor: Executor | None = None
    """What trains; None: processes of this machine."""

    @property
    def on_cluster(self) -> bool:
        """Whether a cluster trains, so that this machine need not have the device."""
        from atdiag.execution.slurm import SlurmExecutor

        return isinstance(self.executor, SlurmExecutor)

    def reading(self, series: Series) -> Reading:
        """Return the reading of a series, all of whose runs are finished and measured."""
        from atdiag.study.aggregate import read

        return read(series, self.settings, self.store, self.equivalence)

    def plan(self, specs: Sequence[RunSpec]) -> Plan:
        """Plan some runs: which are unfinished, and their cost."""
        from atdiag.execution import plan

        made = plan.make(specs, self.store, self.options, self.gpu, self.on_cluster)
        return made if self.choice is None else replace(made, speed=self.choice.flops_per_second)


def open_session(
    profile: str | None,
    set_: list[str],
    seeds: int | None,
    first_seed: int | None,
    equivalence: float | None,
    runs: Path | None,
    data_dir: Path | None,
    classes: Path | None = None,
    data: str | None = None,
    split: float | None = None,
    student: str | None = None,
    executor: str | None = None,
    recipe: str | None = None,
    **given: Any,
) -> ExperimentSession:
    """Resolve the options of an experiment. Raises UserError for any invalid one.

    executor: ``local`` or ``slurm``; None: as the settings file says. given: execution options, and ``slurm_KEY`` for
    the fields of :class:`~atdiag.execution.slurm_options.SlurmOptions`.
    """
    from atdiag.core.runs import Store
    from atdiag.execution import devices, torchrun
    from atdiag.training import compiled, tracking

    given = {**given, "ranks": torchrun.ranks(given.get("ranks", 1))}
    if equivalence is not None and not 0 < equivalence < 100:
        raise UserError(f"`equivalence` {equivalence:g} is not a margin", "give points above 0, such as 0.5")
    compiled.choice()
    settings = resolve(
        data_dir,
        profile=profile,
        seeds=seeds,
        first_seed=first_seed,
        sets=set_,
        runs=runs,
        classes=classes,
        data=data,
        split=split,
        student=student,
        recipe=recipe,
    )
    options = execution_options({**given, "data_dir": settings.data_dir, "threads": settings.profile.threads})
    options = replace(options, device=devices.named(options.device or settings.profile.device))
    devices.number(options.devices)
    tracking.check(options.track)
    trains = _executor(executor or settings.executor or "local", settings, given)
    if trains is not None:
        trains.processes(options)
        options = replace(options, device=options.device or "cuda")
    if not paths.is_folder(settings.runs):  # an existing folder may be read-only: finished runs are only read
        paths.writable(settings.runs, "runs")
    return ExperimentSession(settings, Store(settings.runs), options, equivalence, executor=trains)


EXECUTORS = ("local", "slurm")
"""What can train, by name."""


def _executor(name: str, settings: Settings, given: Mapping[str, Any]) -> Executor | None:
    """Return what trains, by name; None for processes of this machine. Raises UserError."""
    from atdiag.execution.slurm import SlurmExecutor
    from atdiag.execution.slurm_options import SlurmOptions

    if name not in EXECUTORS:
        raise UserError(f"`executor` {name!r} is not known{suggest(name, EXECUTORS)}", f"known: {', '.join(EXECUTORS)}")
    own = {key.removeprefix("slurm_"): value for key, value in given.items() if key.startswith("slurm_")}
    line = {key: value for key, value in own.items() if value is not None}
    options = SlurmOptions.parse(settings.slurm, line)
    if name == "slurm":
        return SlurmExecutor(options)
    if line:
        raise UserError(f"`slurm.{next(iter(line))}` is for a cluster", "add `executor` slurm")
    return None


@dataclass(frozen=True)
class InspectionOptions:
    """Options common to all analyses of networks."""

    label: Sequence[str] | None = None
    skip_bad: bool = False
    data: str | None = None
    split: float | None = None
    set_: Sequence[str] = ()
    """Settings, as ``NAME=VALUE``."""
    data_dir: Path | None = None
    profile: str | None = None
    runs: Path | None = None
    device: str | None = None
    out: Path | None = None
    """Folder for tables and figures; None: they are not written."""
    spoken: Callable[[str], str] = str
    """Spells the arguments that are named in notes."""

    def names(self, count: int) -> list[str] | None:
        """Return the given names of ``count`` subjects, if any. Raises UserError for another number, or equal names."""
        if not self.label:
            return None
        if len(self.label) != count or len(set(self.label)) != count or not all(map(str.strip, self.label)):
            told = f"there are {count} subjects" if count > 1 else "there is one subject"
            raise UserError(f"`label` {', '.join(map(repr, self.label))}: {told}", "give each a name of its own")
        return list(self.label)

    def folder(self) -> Path | None:
        """Return the folder for tables and figures, if any. Raises UserError if it can't be written."""
        if self.out is None:
            return None
        out = self.out.expanduser()
        paths.writable(out, "out")
        return out


class InspectionSession:
    """Subjects by their references, and images for them."""

    def __init__(
        self, references: Sequence[str | nn.Module], given: InspectionOptions, classes: Path | None = None
    ) -> None:
        """classes: the user's list of classes, for heads with as many rows."""
        from atdiag.core.runs import Store
        from atdiag.execution import devices

        named = [one for one in references if isinstance(one, str)]
        for reference in named:
            check_exists(reference)
        settings = resolve(  # before anything heavy is loaded
            given.data_dir,
            profile=given.profile,
            sets=given.set_,
            runs=given.runs,
            classes=classes,
            training=False,
            data=given.data,
            split=given.split,
        )
        from atdiag.analysis import modules, subjects
        from atdiag.study import own

        if (first := next(filter(subjects.is_teacher, named), None)) is not None:
            settings = own.suited(settings, first, training=False)
        self.given = given
        self.profile = settings.profile.name
        self.store = Store(settings.runs)
        self.device = devices.resolve(given.device)
        typed = {"data.name": given.data, "data.split": given.split}
        asked = {name for name, value in typed.items() if value is not None}
        asked |= {name for item in given.set_ if (name := item.partition("=")[0].strip()).startswith("data.")}
        self.subjects, self.data = modules.find_among(
            references, self.profile, settings.profile.data, self.store, asked
        )
        names = given.names(len(references)) or [one.label for one in self.subjects]
        self.subjects = [
            replace(one, label=name).to(self.device) for one, name in zip(self.subjects, names, strict=True)
        ]
        if settings.classes is not None:
            self.subjects = subjects.with_classes(self.subjects, settings.classes)

    def pictures(self, images: Sequence[str] | None, default: int = 256) -> ImageSet:
        """Return the given images, by default ``default`` of the data set's.

        Raises UserError unless all subjects take images of the same format.
        """
        import numpy as np

        from atdiag.analysis.images import choose
        from atdiag.analysis.tracing import check_images

        check_images(self.subjects)  # before opening images, which could fit none of them
        network = self.subjects[0].network
        if images:
            return choose(list(images), self.data, network, self.given.skip_bad)
        every = choose(0, self.data, network)
        count = min(default, len(every))
        return every.reordered(np.arange(count, dtype=np.int64) * len(every) // count)

    def notes(self, pictures: ImageSet) -> list[str]:
        """Return notes on weights that were chosen, images that were left out, and runs trained on other data."""
        return [*filter(None, (one.note for one in self.subjects)), *left_out(pictures), *self._elsewhere(pictures)]

    def _elsewhere(self, pictures: ImageSet) -> list[str]:
        """Return notes on runs that were trained on another data set than these images come from."""
        return [
            f"{one.label} was trained on {one.data.name}"
            for one in self.subjects
            if one.spec is not None and one.data is not None
            if pictures.data is not None and one.data.name != pictures.data.name
        ]


SUBJECT = "a teacher (clip_b), a run's id (start:ID: before its first step), a file of a run, or timm:MODEL[@FILE]"
"""Ways to name a network."""


def check_exists(reference: str) -> None:
    """Raise UserError for a reference that is, or ends with, the path of a file that does not exist."""
    from atdiag.networks.weights import sources

    path, *_ = sources.split_marks(reference)
    if path.exists() or reference.startswith("timm:"):  # whose model is looked at first, by timm
        return
    name, file, _ = sources.split_reference(reference)
    if file is not None and not file.exists():
        raise UserError(f"{file}: there is no such file (weights of {name}){sources.near(file)}")
    if file is None and ":" not in reference and ("/" in reference or reference.endswith(sources.SUFFIXES)):
        raise UserError(f"there is no file {path}{sources.near(path)}", f"what can be named is {SUBJECT}")


def chosen(text: str | None, count: int, argument: str) -> tuple[int, ...] | None:
    """Parse blocks or heads; None for all. Raises UserError."""
    from atdiag.core.selection import indices

    return None if text is None else indices(text, count, argument)


def chosen_of_all(text: str | None, subjects: Sequence[Subject]) -> tuple[int, ...] | None:
    """Parse blocks that every subject has; None: all of each. Raises UserError."""
    depths = sorted({one.network.depth for one in subjects})
    if text is not None and len(depths) > 1 and ":" in text:
        told = " and ".join(map(str, depths))
        raise UserError(f"`layers` {text}: the subjects have {told} blocks", "name blocks by number, as 0,5,11")
    return chosen(text, depths[0], "layers")


def layer_pairs(text: str | None) -> dict[int, int] | None:
    """Parse ``0:0,5:11`` as a mapping. Raises UserError."""
    if text is None:
        return None
    out: dict[int, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if not found:
            raise UserError(f"`layer_map` {text!r} is not a list of pairs", "write it as 0:0,5:11")
        if int(found[1]) in out:
            raise UserError(
                f"`layer_map` {text!r} has layer {int(found[1])} of A twice", "each is compared with one of B's"
            )
        out[int(found[1])] = int(found[2])
    return out


def stem(*parts: str) -> str:
    """Return a readable file name for the given parts, distinct from that of any others."""
    words = [re.sub(r"[^\w.-]+", "_", part).strip("_")[:40] for part in parts[:2]]
    return f"{'-'.join(words)}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:6]}"


@contextlib.contextmanager
def watched(**several: ImageSet) -> Iterator[None]:
    """Show a progress bar on a terminal for each set of images, under its name."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with console.bar(*columns) as bar:
        for name, pictures in several.items():
            pictures.on_progress = _ticker(bar, bar.add_task(name.replace("_", " "), total=len(pictures)))
        yield


def _ticker(bar: Progress | NotebookBar, task: TaskID) -> Callable[[int], None]:
    return lambda done: bar.update(task, completed=done)


def left_out(pictures: ImageSet, kind: str = "images") -> list[str]:
    """Return a note on unreadable images, with the first few names; empty if there are none."""
    names = list(pictures.skipped)
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    told = f"{', '.join(names[:_NAMED])}{more}"
    return [f"{len(names)} of {len(pictures)} {kind} can't be read and are left out: {told}"]


_NAMED = 10


def head_record(head: HeadRows | None, warning: str, spoken: Callable[[str], str] = str) -> dict[str, str | None]:
    """Return how the rows of a head were matched with classes, and the warning if that looks wrong, as a record."""
    return {"rows": "" if head is None else spoken(head.note), "warning": spoken(warning) or None}


def shown_on(pictures: ImageSet) -> str:
    """Describe the images: ``256 test images of digits``."""
    seen = len(pictures) - len(pictures.skipped)
    return f"{seen} images" if pictures.data is None else f"{seen} test images of {pictures.data.name}"
