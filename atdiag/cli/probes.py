"""``atdiag probe``: layer-wise probing.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli.options import Classes
from atdiag.cli.session import (
    SUBJECT,
    InspectionOptions,
    InspectionSession,
    Layers,
    add,
    chosen_of_all,
    head_record,
    left_out,
    shown_on,
    stem,
    watched,
)
from atdiag.reports.console import table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

    from atdiag.analysis.subjects import Subject


# --- probe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arm:
    """One condition: its name, if a finished experiment gives one, and the references of its runs."""

    name: str | None
    references: tuple[str, ...]


def _arms(references: Sequence[str]) -> list[_Arm]:
    """Resolve references: a subject by itself; for an experiment's JSON file, its teachers and every arm, each once."""
    from atdiag.core.errors import UserError

    out: list[_Arm] = []
    for reference in references:
        if not reference.endswith(".json"):
            out.append(_Arm(None, (reference,)))
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


def _of_studies(studies: Sequence[Mapping[str, Any]]) -> list[_Arm]:
    """Return the arms and teachers of an experiment's studies; the same runs in several studies are one arm.

    An arm that not all studies share is named with the label of its study, the first of several.
    """
    labels: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for study in studies:
        for arm in study["arms"]:
            labels.setdefault((str(arm["arm"]), tuple(map(str, arm["runs"]))), []).append(str(study["study"]))
    arms: dict[tuple[str, ...], _Arm] = {}
    for (name, runs), of in labels.items():
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        arms.setdefault(runs, _Arm(name if len(of) == len(studies) else f"{of[0]}{more}: {name}", runs))
    for study in studies:
        if study["reference"]:
            runs = tuple(map(str, study["reference"]["runs"]))
            arms.setdefault(runs, _Arm(f"{study['teacher']} itself", runs))
    return list(arms.values())


def _named(arms: Sequence[_Arm], subjects: Sequence[Subject]) -> list[tuple[str, int]]:
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


def probe(
    given: InspectionOptions,
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="SUBJECT...",
            help=f"What to examine: {SUBJECT}, or an experiment's .json under results: all of its arms.",
        ),
    ],
    layers: Layers = None,
    train: Annotated[
        int | None, typer.Option(help="Training images for the probes. [default: the data set's, at most 20000]")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="A number of test images, or indices. [default: all]")
    ] = None,
    neighbours: Annotated[int, typer.Option(help="How many nearest neighbours vote.")] = 20,
    classes: Classes = None,
) -> None:
    """Probe every layer's tokens for the classes, and apply the trained head to every layer.

    A linear probe (its regularisation chosen on held-out training images if each class has two or more), nearest
    neighbours by cosine, and nearest class means, on class token, mean patch token, and both.
    """
    from atdiag.analysis import probing
    from atdiag.core.errors import UserError
    from atdiag.reports import writers
    from atdiag.study import depth

    folder = given.folder("probe")
    arms = _arms(subjects)
    if labels := given.names(len(arms)):
        arms = [replace(arm, name=label) for arm, label in zip(arms, labels, strict=True)]
    every = [reference for arm in arms for reference in arm.references]
    session = InspectionSession(every, replace(given, label=None), classes)
    names = _named(arms, session.subjects)
    asked = chosen_of_all(layers, session.subjects)
    pictures = session.pictures(images or ["0"])
    data_set = pictures.data
    if data_set is None:
        raise UserError("the classes of these images are not known", "give --images a number or indices")
    count = min(data_set.train, 20_000) if train is None else train
    fitted = probing.training_pictures(data_set, session.subjects[0].network, count, given.skip_bad)
    with watched(training_images=fitted, test_images=pictures):
        probed = probing.probe(session.subjects, fitted, pictures, asked, neighbours)
    held_out, found = probed[0].held_out, iter(probed)
    groups = {name: [next(found) for _ in range(count)] for name, count in names}
    heads = {name: head_record(group[0].head, group[0].warning) for name, group in groups.items() if group[0].head}
    frame = depth.frame(groups)
    document = {
        "command": "probe",
        "profile": session.profile,
        "data": data_set.model_dump(mode="json"),
        "subjects": [
            {"subject": name, "runs": [{"label": one.label, "id": one.id} for one in group], "head": heads.get(name)}
            for name, group in groups.items()
        ],
        "train": int(frame.train.iloc[0]),
        "train_left_out": list(fitted.skipped),
        "images": int(frame.images.iloc[0]),
        "left_out": list(pictures.skipped),
        "neighbours": neighbours,
        "regularisation": {"fixed": held_out == 0, "held_out": held_out, "stratified": held_out > 0},
        "rows": json.loads(frame.to_json(orient="records")),
    }

    def depth_of() -> Figure:
        from figures import depth as figures

        return figures.depth(frame)

    def grid() -> Figure:
        from figures import depth as figures

        return figures.grid(frame)

    ids = [one.id for group in groups.values() for one in group]
    described = [str(asked), str(len(fitted)), str(neighbours), data_set.model_dump_json(), *pictures.names]
    written = writers.write(
        folder,
        stem("+".join(groups), data_set.name, *ids, *described),
        {"csv": frame.to_csv(index=False)},
        document,
        {"": depth_of, "-all": grid},
    )
    notes = [
        f"fitted to {document['train']} training images of {data_set.name}, {_regularised(held_out)}; "
        f"measured on {shown_on(pictures)}",
        f"nearest neighbours: {neighbours}, cosine, majority; 95 % intervals over test images, and seeds where there "
        "are several",
    ]
    notes += [f"which row of the head of {name} is which class: {head['rows']}" for name, head in heads.items()]
    notes += [f"{name} is {head['warning']}" for name, head in heads.items() if head["warning"]]
    notes += left_out(fitted, "training images")
    session.tell(_probe_tables(frame), notes, written, document, pictures)


def _regularised(held_out: int) -> str:
    """Describe how the linear probe's regularisation was chosen."""
    from atdiag.training import classifiers

    if held_out:
        return f"regularisation chosen on {held_out} of them, each class in proportion"
    return (
        "regularisation fixed (C = "
        f"{classifiers.FIXED_C:g}, scikit-learn's default): a class with a single image (or source of images) leaves "
        "nothing to choose it on"
    )


def _probe_tables(frame: pd.DataFrame) -> list[Table]:
    """Return tables: every probe for one or two subjects; linear probe and early exit side by side for more."""
    names = list(frame.subject.unique())
    most = {name: "both" if ((frame.subject == name) & (frame.tokens == "both")).any() else "patch" for name in names}
    values = {
        (row.subject, row.probe, row.tokens, row.layer): (row.top1, row.ci_low, row.ci_high)
        for row in frame.itertuples()
    }
    layers = sorted(layer for layer in frame.layer.unique() if layer >= 0)

    def cell(name: str, probe: str, tokens: str, layer: int, interval: bool = False) -> str:
        found = values.get((name, probe, tokens, layer))
        if found is None:
            return "-"
        top1, low, high = found
        return f"{top1:.1f} [{low:.1f}, {high:.1f}]" if interval else f"{top1:.1f}"

    out = []
    if len(names) <= 2:
        for name in names:
            full = table(
                f"probe - {name}", "layer", "linear: class", "patch", "both", "k-NN", "class mean", "early exit [95 %]"
            )
            for layer in layers:
                cells = [cell(name, "linear", tokens, layer) for tokens in ("class", "patch", "both")]
                cells += [cell(name, kind, most[name], layer) for kind in ("knn", "centroid")]
                full.add_row(str(layer), *cells, cell(name, "head", "", layer, True))
            full.add_section()
            full.add_row("itself", *[""] * 5, cell(name, "itself", "", -1, True))
            out.append(full)
        return out
    for kind, title in (("linear", "linear probe [95 %]"), ("head", "early exit [95 %]")):
        side = table(f"probe - {title}", "subject", *(f"layer {layer}" for layer in _some(layers)))
        for name in names:
            tokens = most[name] if kind == "linear" else ""
            side.add_row(name, *(cell(name, kind, tokens, layer, True) for layer in _some(layers)))
        out.append(side)
    return out


def _some(layers: Sequence[int]) -> list[int]:
    """Return at most three layers, including the first and the last: a terminal is narrow."""
    count = min(3, len(layers))
    places = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    return [layers[place] for place in places]


def add_commands(app: typer.Typer) -> None:
    """Add the command of this module."""
    add(app, "probe", probe)
