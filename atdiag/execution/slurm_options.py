"""How a cluster is asked for what a run needs: ``[slurm]`` in ``atdiag.toml``, or ``--slurm.KEY``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

from atdiag.core.errors import UserError, suggest


def _key(about: str, default: Any = None, flag: str = "") -> Any:
    return field(default=default, metadata={"about": about, "flag": flag})


@dataclass(frozen=True)
class SlurmOptions:
    """What is asked of SLURM for each task of a job array. None: the cluster's default, or what is said."""

    partition: str | None = _key("the partition, or several as a,b", flag="--partition")
    account: str | None = _key("the account that is charged", flag="--account")
    qos: str | None = _key("the quality of service", flag="--qos")
    time: str | None = _key("the time limit, as 4:00:00 or 1-12; by default from the estimate", flag="--time")
    memory: str | None = _key("memory of a task, as 64G", flag="--mem")
    gres: str | None = _key("devices; gpu:1 by default where runs are trained on one; '' for none", flag="--gres")
    constraint: str | None = _key("features that a node must have", flag="--constraint")
    cpus: int | None = _key("processor cores of a task; 8 beside a GPU by default", flag="--cpus-per-task")
    throttle: int | None = _key("tasks that run at once; by default as many as there are devices to use, else all")
    setup: tuple[str, ...] = _key("lines of shell before the training, such as module load cuda", ())
    container: str | None = _key("what runs Python in a container, such as apptainer exec --nv atdiag.sif")
    python: str | None = _key("the Python on the nodes; by default the one in use here")
    extra: str | None = _key("further options of sbatch, such as --exclude=node7 --mail-type=FAIL")
    notice: int = _key("seconds before the time limit at which runs write checkpoints and the task is requeued", 120)
    poll: float = _key("seconds between two questions to the scheduler with --wait", 15.0)

    @classmethod
    def parse(cls, file: Mapping[str, Any], line: Mapping[str, Any], where: str = "atdiag.toml") -> Self:
        """Return the options of the table ``[slurm]`` and of the command line, which wins. Raises UserError.

        line: texts as typed, or values from Python.
        """
        known = {one.name: one for one in fields(cls)}
        values: dict[str, Any] = {}
        for origin, given in ((f"{where}: ", file), ("", line)):
            for name, value in given.items():
                if name not in known:
                    raise UserError(
                        f"{origin}slurm.{name} is not known{suggest(name, known)}", f"known: {', '.join(known)}"
                    )
                spoken = f"{origin}slurm.{name} = {value!r}" if origin else f"`slurm.{name}` {value!r}"
                values[name] = _value(known[name], value, spoken)
        return cls(**values)

    def __post_init__(self) -> None:
        """Raise UserError for values that SLURM would not understand as they are meant."""
        for name in ("cpus", "throttle", "notice"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"`slurm.{name}` {value}", "give 1 or more")
        if self.notice > 3600:
            raise UserError(f"`slurm.notice` {self.notice} is more than an hour", "give seconds, such as 120")
        if self.poll <= 0:
            raise UserError(f"`slurm.poll` {self.poll:g}", "give seconds above 0, such as 15")
        if self.time is not None:
            seconds(self.time)

    def flags(self) -> list[str]:
        """Return what sbatch is told of these options; ``time``, ``gres`` and ``cpus`` only where they are given."""
        out = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata["flag"] and value not in (None, ""):
                out.append(f"{one.metadata['flag']}={value}")
        return [*out, *shlex.split(self.extra or "")]


def _value(known: Field[Any], value: Any, spoken: str) -> Any:
    """Return a value as its field has it. Raises UserError for one of another type."""
    kind = str(known.type)
    if kind.startswith("tuple"):
        lines = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(line, str) for line in lines):
            return tuple(part for line in lines for part in line.splitlines() if part.strip())
        raise UserError(f"{spoken} is no list of lines", 'write it as ["module load cuda"]')
    if kind.startswith("str"):
        if isinstance(value, str | int) and not isinstance(value, bool) and "\n" not in str(value):
            return str(value)
        raise UserError(f"{spoken} is no text on one line", "write it as sbatch takes it")
    number: type = float if kind == "float" else int
    try:
        if isinstance(value, bool) or (number is int and isinstance(value, float)):
            raise ValueError
        return number(value)
    except (ValueError, TypeError):
        raise UserError(f"{spoken} is no {'whole ' * (number is int)}number", "give one, such as 8") from None


def seconds(limit: str) -> float:
    """Return the seconds of a time as SLURM writes it: ``30`` (minutes), ``4:00:00``, ``1-12``, ``infinite``.

    Raises UserError for anything else.

    >>> seconds("90"), seconds("1:30:00"), seconds("1-12"), seconds("1-00:30"), seconds("infinite")
    (5400.0, 5400.0, 129600.0, 88200.0, inf)
    """
    if limit.lower() in ("infinite", "unlimited"):
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if not found:
        raise UserError(f"`slurm.time` {limit!r} is not a time limit", "write it as 4:00:00 or 1-12")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:  # days-hours:minutes:seconds
        return float(days * 86400 + first * 3600 + second * 60 + third)
    if found[4] is not None:
        return float(first * 3600 + second * 60 + third)
    return float(first * 60 + second)


def limit(seconds: float) -> str:
    """Return a time as SLURM takes it, rounded up to a minute.

    >>> limit(59), limit(5400), limit(129600)
    ('0:01:00', '1:30:00', '1-12:00:00')
    """
    minutes = -(-int(seconds) // 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return (f"{days}-{hours:02}" if days else f"{hours}") + f":{minutes % 60:02}:00"
