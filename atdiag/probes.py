"""Commands that show what layers know and where they look: probe, attention-stats, maps.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.desk import (
    SUBJECT,
    Desk,
    Given,
    Images,
    Layers,
    add,
    chosen,
    left_out,
    shown_on,
    stem,
    table,
    watched,
    write,
)

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from atdiag.analysis.attention_stats import Stats
    from atdiag.analysis.maps import Shown
    from atdiag.analysis.subjects import Subject

Subjects = Annotated[
    list[str],
    typer.Argument(metavar="SUBJECT...", help=f"What to look into: {SUBJECT}; several are shown side by side."),
]


# --- probe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arm:
    """One condition: a name, where a finished experiment gives one, and the references of its runs."""

    name: str | None
    references: tuple[str, ...]


def _arms(references: Sequence[str]) -> list[_Arm]:
    """What is meant: a subject as it is; of an experiment's JSON file the teacher itself and every arm."""
    from atdiag.words import UserError

    out: list[_Arm] = []
    for reference in references:
        if not reference.endswith(".json"):
            out.append(_Arm(None, (reference,)))
            continue
        path = Path(reference).expanduser()
        try:
            report = json.loads(path.read_text())
            found = [_Arm(str(arm["arm"]), tuple(map(str, arm["runs"]))) for arm in report["arms"]]
            if report["reference"]:
                found.append(_Arm(f"{report['teacher']} itself", tuple(report["reference"]["runs"])))
        except FileNotFoundError:
            raise UserError(f"there is no file {path}", "an experiment writes its .json under results/") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} is not the JSON file of an experiment", "'atdiag reinit' and its likes write one"
            ) from None
        out += found
    return out


def _named(arms: Sequence[_Arm], subjects: Sequence[Subject]) -> list[tuple[str, int]]:
    """The name of each arm, no two alike, and how many subjects are its runs."""
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


def _layers(text: str | None, subjects: Sequence[Subject]) -> tuple[int, ...] | None:
    """Blocks as they are typed, which every subject has. None: all of each. Raises UserError."""
    from atdiag.words import UserError

    depths = sorted({one.network.depth for one in subjects})
    if text is not None and len(depths) > 1 and ":" in text:
        told = " and ".join(map(str, depths))
        raise UserError(f"--layers {text}: the subjects have {told} blocks", "name blocks by number, as 0,5,11")
    return chosen(text, depths[0], "--layers")


def probe(
    given: Given,
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="SUBJECT...",
            help=f"What to look into: {SUBJECT}, or an experiment's .json under results: all of its arms.",
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
) -> None:
    """What each layer knows: accuracy of probes on every layer's tokens, and of the trained head put on it.

    A linear probe (its regularisation chosen on a held-out part of the training images), nearest neighbours by cosine,
    and nearest class means, on class token, mean patch token, and both.
    """
    from atdiag.analysis import classifiers, probing
    from atdiag.study import depth
    from atdiag.words import UserError
    from figures import depth as figures

    folder = given.folder("probe")
    arms = _arms(subjects)
    desk = Desk([reference for arm in arms for reference in arm.references], given)
    names = _named(arms, desk.subjects)
    asked = _layers(layers, desk.subjects)
    pictures = desk.pictures(images or ["0"])
    data_set = pictures.data
    if data_set is None:
        raise UserError("the classes of these images are not known", "give --images a number or indices")
    count = min(data_set.train, 20_000) if train is None else train
    fitted = probing.training_pictures(data_set, desk.subjects[0].network, count, given.skip_bad)
    with watched(training_images=fitted, test_images=pictures):
        found = iter(probing.probe(desk.subjects, fitted, pictures, asked, neighbours))
    groups = {name: [next(found) for _ in range(count)] for name, count in names}
    frame = depth.frame(groups)
    document = {
        "command": "probe",
        "profile": desk.profile,
        "data": data_set.model_dump(mode="json"),
        "subjects": [
            {"subject": name, "runs": [{"label": one.label, "id": one.id} for one in group]}
            for name, group in groups.items()
        ],
        "train": int(frame.train.iloc[0]),
        "train_left_out": list(fitted.skipped),
        "images": int(frame.images.iloc[0]),
        "left_out": list(pictures.skipped),
        "neighbours": neighbours,
        "rows": json.loads(frame.to_json(orient="records")),
    }
    drawn = {"": figures.depth(frame), "-all": figures.grid(frame)}
    ids = [one.id for group in groups.values() for one in group]
    described = [str(asked), str(len(fitted)), str(neighbours), data_set.model_dump_json(), *pictures.names]
    files = write(folder, stem("+".join(groups), data_set.name, *ids, *described), frame, document, drawn)
    notes = [
        f"fitted to {document['train']} training images of {data_set.name}, regularisation chosen on "
        f"{100 * classifiers.HELD_OUT:.0f} % of them; measured on {shown_on(pictures)}",
        f"nearest neighbours: {neighbours}, cosine, majority; 95 % intervals over test images, and seeds where there "
        "are several",
    ]
    notes += left_out(fitted, "training images")
    desk.tell(_probe_tables(frame), notes, files, document, pictures)


def _probe_tables(frame: pd.DataFrame) -> list[Table]:
    """Of one or two subjects every probe; of more the linear probe and the early exit, side by side."""
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
    """At most three of them, first and last among them: a terminal is not wide."""
    count = min(3, len(layers))
    places = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    return [layers[place] for place in places]


# --- attention-stats -----------------------------------------------------------------------------------------------


def attention_stats(
    given: Given,
    subjects: Subjects,
    layers: Layers = None,
    images: Images = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="The norm above which a token is high-norm. [default: 4 times the image's median]"),
    ] = None,
    rank_images: Annotated[int, typer.Option(help="Images for the effective rank, which is slow.")] = 64,
) -> None:
    """What attention looks like in numbers, by layer and head; several subjects side by side.

    Entropy, attention distance, share on class token and registers, sinks, redundancy of heads, effective rank,
    high-norm tokens: what each is, and its source, lies in the module atdiag.analysis.attention_stats.
    """
    import pandas as pd

    from atdiag.analysis import attention_stats as work
    from atdiag.words import UserError
    from figures import attention_stats as figures

    if rank_images < 1 or (threshold is not None and not threshold > 0):
        raise UserError("--rank-images and --threshold are positive numbers")
    folder = given.folder("attention-stats")
    desk = Desk(subjects, given)
    asked = _layers(layers, desk.subjects)
    pictures = desk.pictures(images)
    with watched(images=pictures):
        found = work.attention_stats(desk.subjects, pictures, asked, threshold, rank_images)
    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    document = {
        "command": "attention-stats",
        "profile": desk.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in found],
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "rank_images": found[0].rank_images,
        "threshold": threshold,
        "rows": json.loads(frame.to_json(orient="records")),
    }
    labels = "+".join(one.label for one in found)
    described = [*(one.id for one in found), str(asked), str(threshold), str(rank_images), *pictures.names]
    drawn = {"": figures.attention_stats(found)}
    files = write(folder, stem(labels, shown_on(pictures), *described), frame, document, drawn)
    high = f"above {threshold:g}" if threshold is not None else f"above {work.HIGH_NORM:g} x the median of the image's"
    notes = [
        f"{shown_on(pictures)} (effective rank: {found[0].rank_images}); means over heads, each head in the CSV",
        f"entropy and divergence of heads in bits, distance in pixels; high-norm: share of tokens whose norm is {high}",
    ]
    desk.tell([_stats_table(one) for one in found], notes, files, document, pictures)


_SHORT = {
    "entropy": "entropy",
    "distance": "dist",
    "class_share": "cls",
    "register_share": "regs",
    "sink": "sink",
    "redundancy": "heads",
    "rank": "rank",
    "high_norm": "high",
    "norm": "norm",
}


def _stats_table(one: Stats) -> Table:
    """A line for each layer: the mean over heads of each number that there is."""
    import numpy as np

    columns = {name: values.mean(1) for name, values in one.heads.items()} | dict(one.layers_only)
    columns = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    out = table(f"attention-stats - {one.label}", "layer", *(_SHORT[name] for name in columns))
    for i, layer in enumerate(one.layers):
        out.add_row(str(layer), *(f"{values[i]:.3g}" for values in columns.values()))
    return out


# --- maps ----------------------------------------------------------------------------------------------------------


def maps(
    given: Given,
    subjects: Subjects,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images", help="Test images by index, as 0,1; files, or a folder. Repeatable. [default: the first]"
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, such as 0,5,11. [default: first, middle, last]")] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(help="Whose attention: centre, cls, or x,y in pixels. Repeatable. [default: centre]"),
    ] = None,
    head: Annotated[str, typer.Option(help="mean, all, or a head's number.")] = "mean",
    no_rollout: Annotated[bool, typer.Option("--no-rollout", help="Leave the attention rollout out.")] = False,
) -> None:
    """Pictures of where networks look: subjects down, layers across, for each image and query a figure.

    At the end of a row the attention rollout up to its last layer.
    """
    import pandas as pd

    from atdiag.analysis import images as choosing
    from atdiag.analysis import maps as work
    from atdiag.words import UserError
    from figures import attention_maps as figures

    if head not in ("mean", "all") and not head.isdecimal():
        raise UserError(f"--head {head!r}", "give mean, all, or a number")
    folder = given.folder("maps")
    wanted = images or ["0"]
    if all(re.fullmatch(r"[\d\s,-]+", text) and not Path(text).exists() for text in wanted):
        wanted = [",".join([*wanted, ""])]  # indices, and no number of images
    meant = choosing.named(wanted)
    assert not isinstance(meant, int)
    if len(meant) > _MOST_IMAGES:  # said before networks are loaded
        raise UserError(f"{len(meant)} images are {len(meant)} figures", f"give at most {_MOST_IMAGES}")
    desk = Desk(subjects, given)
    asked = _layers(layers, desk.subjects)
    which: Any = int(head) if head.isdecimal() else head
    queries = tuple(query or ["centre"])
    found: list[Shown] = []
    for one in desk.subjects:
        # Each sees the images at its own size: networks of different token grids can be laid side by side.
        pictures = choosing.choose(wanted, desk.data, one.network, given.skip_bad)
        with watched(images=pictures):
            found.append(work.maps(one, pictures, asked, queries, which, not no_rollout))
    frame = pd.concat([shown.frame() for shown in found], ignore_index=True)
    drawn = {
        f"-{i}" + (f"-{name.replace(',', '_')}" if len(queries) > 1 else ""): figures.attention_maps(found, i, q)
        for i in range(len(found[0].names))
        for q, name in enumerate(queries)
    }
    document = {
        "command": "maps",
        "profile": desk.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in desk.subjects],
        "images": list(found[0].names),
        "left_out": list(pictures.skipped),
        "queries": list(queries),
        "heads": list(found[0].heads),
        "rows": json.loads(frame.to_json(orient="records")),
    }
    labels = "+".join(shown.label for shown in found)
    described = [*(one.id for one in desk.subjects), str(asked), head, str(no_rollout), *queries, *found[0].names]
    files = write(folder, stem(labels, queries[0], *described), frame, document, drawn)
    summary = table("maps", "subject", "layers", "largest weight", "not on patches")
    for shown in found:
        largest = shown.attention.max((-2, -1)).mean((0, 2, 3))
        elsewhere = shown.elsewhere.mean((0, 2, 3))
        spread = [" ".join(f"{value:.2f}" for value in values) for values in (largest, elsewhere)]
        summary.add_row(shown.label, " ".join(map(str, shown.layers)), *spread)
    notes = ["each map from 0 to its own largest weight; by layer, means over images, queries and heads"]
    desk.tell([summary], notes, files, document, pictures)


_MOST_IMAGES = 100


def add_commands(app: typer.Typer) -> None:
    """The commands of this module."""
    add(app, "probe", probe)
    add(app, "attention-stats", attention_stats)
    add(app, "maps", maps)
