"""What ``probe`` is asked about: subjects, and the arms of an experiment; and what it says. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

    from atdiag.analysis.subjects import Subject
    from atdiag.reports.writers import Drawing


@dataclass(frozen=True)
class Condition:
    """One condition: its name, if a finished experiment gives one, and the references of its runs."""

    name: str | None
    references: tuple[str | nn.Module, ...]


def arms(references: Sequence[str | Path | nn.Module]) -> list[Condition]:
    """Resolve references: a subject by itself; for an experiment's JSON file, its teachers and every arm, each once."""
    out: list[Condition] = []
    for reference in references:
        if not isinstance(reference, str | Path) or not str(reference).endswith(".json"):
            out.append(Condition(None, (str(reference) if isinstance(reference, Path) else reference,)))
            continue
        path = Path(reference).expanduser()
        try:
            found = _of_studies(json.loads(path.read_text())["studies"])
        except FileNotFoundError:
            raise UserError(f"there is no file {path}", "an experiment writes its .json under results/") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is not the JSON file of an experiment", "'atdiag reinit' and its likes write one"
            ) from None
        out += found
    return out


def _of_studies(studies: Sequence[Mapping[str, Any]]) -> list[Condition]:
    """Return the arms and teachers of an experiment's studies; the same runs in several studies are one arm.

    An arm that not all studies share is named with the label of its study, the first of several.
    """
    labels: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for study in studies:
        for arm in study["arms"]:
            labels.setdefault((str(arm["arm"]), tuple(map(str, arm["runs"]))), []).append(str(study["study"]))
    arms: dict[tuple[str, ...], Condition] = {}
    for (name, runs), of in labels.items():
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        arms.setdefault(runs, Condition(name if len(of) == len(studies) else f"{of[0]}{more}: {name}", runs))
    for study in studies:
        if study["reference"]:
            runs = tuple(map(str, study["reference"]["runs"]))
            arms.setdefault(runs, Condition(f"{study['teacher']} itself", runs))
    return list(arms.values())


def named(arms: Sequence[Condition], subjects: Sequence[Subject]) -> list[tuple[str, int]]:
    """Return the name of each arm, all distinct, and the number of subjects that are its runs."""
    out: list[tuple[str, int]] = []
    place = 0
    for arm in arms:
        name = arm.name or subjects[place].label
        place += len(arm.references)
        taken = {one for one, _ in out}
        other = 2
        unique = name
        while unique in taken:
            unique, other = f"{name} ({other})", other + 1
        out.append((unique, len(arm.references)))
    return out


def regularised(held_out: int) -> str:
    """Describe how the linear probe's regularisation was chosen."""
    from atdiag.training import classifiers

    if held_out:
        return f"regularisation chosen on {held_out} of them, each class in proportion"
    return (
        "regularisation fixed (C = "
        f"{classifiers.FIXED_C:g}, scikit-learn's default): a class with a single image (or source of images) leaves "
        "nothing to choose it on"
    )


def verdict(frame: pd.DataFrame) -> str:
    """Return each subject's best linear probe in words."""
    linear = frame[frame.probe == "linear"]
    told = []
    for name in linear.subject.unique():
        of = linear[linear.subject == name]
        best = of.loc[of.top1.idxmax()]
        told.append(f"{name} {best.top1:.1f} % [{best.ci_low:.1f}, {best.ci_high:.1f}] after block {best.layer}")
    return f"The best linear probe, chosen after the fact: {'; '.join(told)}." if told else ""


def drawings(frame: pd.DataFrame) -> dict[str, Drawing]:
    """Return the figures of a probe: by depth, and every probe."""

    def depth_of() -> Figure:
        from figures import depth as figures

        return figures.depth(frame)

    def grid() -> Figure:
        from figures import depth as figures

        return figures.grid(frame)

    return {"": depth_of, "-all": grid}
