"""Plan an execution: which runs to train, in which cohorts, over how many processes, at what cost. Imports no torch.

On a CPU independent cohorts run in parallel processes of one thread each: at miniature size two such processes are far
faster than one process with two threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atdiag.core.errors import UserError
from atdiag.core.options import ExecutionOptions
from atdiag.core.runs import Store
from atdiag.core.spec import RunSpec
from atdiag.core.text import count
from atdiag.execution import bench, cost, devices, gpus

_STARTUP_SECONDS = 8.0


@dataclass(frozen=True)
class Job:
    """The work of one process: cohorts to train in turn."""

    cohorts: tuple[tuple[RunSpec, ...], ...]

    @property
    def specs(self) -> list[RunSpec]:
        """All runs of the job."""
        return [spec for cohort in self.cohorts for spec in cohort]


@dataclass(frozen=True)
class Plan:
    """Runs, which of them are unfinished, and their cost on a device, which need not be on this machine."""

    specs: tuple[RunSpec, ...]
    todo: tuple[RunSpec, ...]
    device: str
    processes: int
    """Number of processes that fit the devices."""
    speed: float
    """FLOP/s of one training process."""
    gpu: str | None = None
    """The kind of GPU, where the plan is for one that is named or known."""
    devices: int = 1
    """Number of devices."""
    basis: str = ""
    """Where the speed is from, as ``measured``."""
    ranks: int = 1
    """Number of ranks, each on a device of its own, that one training process consists of."""

    @property
    def seconds(self) -> float:
        """Estimated wall-clock seconds."""
        return estimate(self.todo, self.processes, self.speed)

    @property
    def device_seconds(self) -> float:
        """Estimated seconds of all devices together, as a cluster charges them."""
        return sum(cost.seconds(spec, self.device_speed) for spec in self.todo)

    @property
    def device_speed(self) -> float:
        """FLOP/s of one device: of all processes that share it."""
        return self.speed / self.ranks * max(1, self.processes * self.ranks // self.devices)


def make(
    specs: Sequence[RunSpec], store: Store, options: ExecutionOptions, gpu: str | None = None, cluster: bool = False
) -> Plan:
    """Plan runs, checking once which are finished.

    gpu: plan for this kind of GPU, which need not be here. cluster: they are trained on other machines, and without
    a number of devices every cohort has its own. Raises UserError for an unknown device, and for more ranks than share
    a batch.
    """
    todo, ranks = tuple(pending(specs, store)), options.ranks
    fit_ranks(todo, ranks)
    device = "cuda" if gpu is not None else devices.named(options.device) or devices.resolve(None)
    if gpu is None and not cluster and devices.is_here(device):
        places = devices.slots(options)
        processes = len(places)
        many = len({name for place in places for name in place.get(devices.VISIBLE, "").split(",")})
    else:
        many = devices.number(options.devices) or (max(1, len(cohorts(todo))) if cluster else 1)
        processes = max(1, many // ranks) * (options.per_device or 1)
        if device == "cpu" and not cluster:
            processes = devices.processes_for(device, options.threads, ranks)
    speed, basis, kind = _speed(todo, store, device, gpu, cluster)
    if device != "cpu":
        speed /= max(1, processes * ranks // many)  # processes on one device share it
    return Plan(tuple(specs), todo, device, processes, speed * ranks, kind, many, basis, ranks)


def _speed(
    todo: Sequence[RunSpec], store: Store, device: str, gpu: str | None, cluster: bool
) -> tuple[float, str, str | None]:
    """Return the FLOP/s of a device, where they are from, and the kind of GPU if it is known."""
    width = min((spec.network.width for spec in todo), default=gpus.WIDE)
    if gpu is not None:
        return gpus.speed(gpu, width), gpus.named(gpu).origin, gpu
    if (found := cost.measured_speed(store, device, default=0.0)) > 0:
        return found, "as in finished runs", None
    here = not cluster and devices.is_here(device)
    if here and (kept := bench.kept(device)) is not None:
        return kept, "measured by 'atdiag doctor --bench'", None
    if device == "cuda":
        kind = (gpus.here() if here else None) or gpus.USUAL
        return gpus.speed(kind, width), gpus.named(kind).origin, kind
    return cost.usual(device), "assumed", None


def fit_ranks(specs: Sequence[RunSpec], ranks: int) -> None:
    """Raise UserError if a batch of one of these runs can't be shared by so many ranks."""
    for recipe in (spec.recipe for spec in specs if spec.recipe.epochs):
        if ranks > recipe.most_ranks:
            pairs = f", {recipe.most_ranks} pairs of images that are mixed" if recipe.mixes else ""
            enough = 2 * ranks - 1 if recipe.mixes else ranks
            raise UserError(
                f"`ranks` {ranks} for a batch of {count(recipe.batch_size, 'image')}{pairs}",
                f"give {recipe.most_ranks} ranks at most, or `recipe.batch_size`={enough}",
            )


def pending(specs: Sequence[RunSpec], store: Store) -> list[RunSpec]:
    """Return the unfinished runs."""
    return [spec for spec in specs if not store.run(spec).finished]


def cohorts(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Group runs that can share a data stream and a teacher. A run without a teacher joins any of its stream."""
    groups: dict[tuple[str, tuple[str, int]], list[RunSpec]] = {}
    first: dict[str, tuple[str, tuple[str, int]]] = {}  # the first group of each stream
    for spec in sorted(specs, key=lambda s: s.teacher is None):  # runs with a teacher start the groups
        stream = spec.stream
        key = first.get(stream, (stream, ("", 0))) if spec.teacher is None else (stream, spec.teacher.seen_as)
        first.setdefault(stream, key)
        groups.setdefault(key, []).append(spec)
    return list(groups.values())


def share_out(specs: Sequence[RunSpec], processes: int) -> list[Job]:
    """Distribute runs over processes so that all end at about the same time, splitting as few cohorts as possible.

    Cohorts are laid end to end by estimated cost and cut into equal parts; a run goes to the part that contains its
    middle.
    """
    laid = [(spec, index) for index, cohort in enumerate(cohorts(specs)) for spec in cohort]
    total = sum(cost.seconds(spec) for spec, _ in laid)
    bins: list[dict[int, list[RunSpec]]] = [{} for _ in range(max(1, min(processes, len(laid))))]
    position = 0.0
    for spec, index in laid:
        own = cost.seconds(spec)
        place = min(int((position + own / 2) / total * len(bins)) if total else 0, len(bins) - 1)
        bins[place].setdefault(index, []).append(spec)
        position += own
    return [Job(tuple(tuple(cohort) for cohort in part.values())) for part in bins if part]


def single(jobs: Sequence[Job]) -> list[Job]:
    """Return each cohort of some jobs as a job of its own, the longest first."""
    alone = [Job((cohort,)) for job in jobs for cohort in job.cohorts]
    return sorted(alone, key=lambda job: -sum(cost.seconds(spec) for spec in job.specs))


def estimate(specs: Sequence[RunSpec], processes: int, flops_per_second: float = cost.FLOPS_PER_SECOND) -> float:
    """Estimate the wall-clock seconds of these runs."""
    if not specs:
        return 0.0
    jobs = share_out(specs, processes)
    return max(sum(cost.seconds(spec, flops_per_second) for spec in job.specs) for job in jobs) + _STARTUP_SECONDS
