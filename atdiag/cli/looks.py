"""Commands that show attention: attention-stats, maps.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli.session import (
    SUBJECT,
    Images,
    InspectionOptions,
    InspectionSession,
    Layers,
    add,
    chosen_of_all,
    shown_on,
    stem,
    watched,
)
from atdiag.reports.console import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from atdiag.analysis.maps import Shown
    from atdiag.analysis.statistics import Stats


# --- probe ---------------------------------------------------------------------------------------------------------


Subjects = Annotated[
    list[str],
    typer.Argument(metavar="SUBJECT...", help=f"What to examine: {SUBJECT}; several are shown side by side."),
]


# --- attention-stats -----------------------------------------------------------------------------------------------


def attention_stats(
    given: InspectionOptions,
    subjects: Subjects,
    layers: Layers = None,
    images: Images = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="The norm above which a token is high-norm. [default: 4 times the image's median]"),
    ] = None,
    rank_images: Annotated[int, typer.Option(help="Images for the effective rank, which is slow.")] = 64,
) -> None:
    """Summarise attention by layer and head in numbers, for several subjects side by side.

    Entropy, attention distance, share on class token and registers, sinks, redundancy of heads, effective rank,
    high-norm tokens. The module atdiag.analysis.statistics defines each and gives its source.
    """
    import pandas as pd

    from atdiag.analysis import statistics as work
    from atdiag.core.errors import UserError
    from atdiag.reports import writers

    if rank_images < 1 or (threshold is not None and not threshold > 0):
        raise UserError("--rank-images and --threshold are positive numbers")
    folder = given.folder("attention-stats")
    session = InspectionSession(subjects, given)
    asked = chosen_of_all(layers, session.subjects)
    pictures = session.pictures(images)
    with watched(images=pictures):
        found = work.attention_stats(session.subjects, pictures, asked, threshold, rank_images)
    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    document = {
        "command": "attention-stats",
        "profile": session.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in found],
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "rank_images": found[0].rank_images,
        "threshold": threshold,
        "rows": json.loads(frame.to_json(orient="records")),
    }
    labels = "+".join(one.label for one in found)
    described = [*(one.id for one in found), str(asked), str(threshold), str(rank_images), *pictures.names]

    def draw() -> Figure:
        from figures import attention_stats as figures

        return figures.attention_stats(found)

    name = stem(labels, shown_on(pictures), *described)
    written = writers.write(folder, name, {"csv": frame.to_csv(index=False)}, document, {"": draw})
    high = f"above {threshold:g}" if threshold is not None else f"above {work.HIGH_NORM:g} x the image's median"
    notes = [
        f"{shown_on(pictures)} (effective rank: {found[0].rank_images}); means over heads, each head in the CSV",
        "entropy in bits; dist: attention distance in pixels; cls, regs: attention on the class token, on registers",
        "sink: share of the most attended token; heads: mean divergence between heads, in bits; rank: effective rank",
        f"high: share of tokens whose norm is {high}; norm: median norm of the patches",
    ]
    session.tell([_stats_table(one) for one in found], notes, written, document, pictures)


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
    """Return a table with a row for each layer: the mean over heads of each available statistic."""
    import numpy as np

    columns = {name: values.mean(1) for name, values in one.heads.items()} | dict(one.layers_only)
    columns = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    out = table(f"attention-stats - {one.label}", "layer", *(_SHORT[name] for name in columns))
    for i, layer in enumerate(one.layers):
        out.add_row(str(layer), *(f"{values[i]:.3g}" for values in columns.values()))
    return out


# --- maps ----------------------------------------------------------------------------------------------------------


def maps(
    given: InspectionOptions,
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
    no_rollout: Annotated[bool, typer.Option("--no-rollout", help="Omit the attention rollout.")] = False,
) -> None:
    """Draw attention maps: subjects in rows, layers in columns, a figure for each image and query.

    Each row ends with the attention rollout up to its last layer.
    """
    import pandas as pd

    from atdiag.analysis import images as choosing
    from atdiag.analysis import maps as work
    from atdiag.core.errors import UserError
    from atdiag.reports import writers

    if head not in ("mean", "all") and not head.isdecimal():
        raise UserError(f"--head {head!r}", "give mean, all, or a number")
    folder = given.folder("maps")
    wanted = images or ["0"]
    if all(re.fullmatch(r"[\d\s,-]+", text) and not Path(text).exists() for text in wanted):
        wanted = [",".join([*wanted, ""])]  # trailing comma: indices rather than a number of images
    meant = choosing.named(wanted)
    assert not isinstance(meant, int)
    if len(meant) > _MOST_IMAGES:  # fail before networks are loaded
        raise UserError(f"{len(meant)} images are {len(meant)} figures", f"give at most {_MOST_IMAGES}")
    session = InspectionSession(subjects, given)
    asked = chosen_of_all(layers, session.subjects)
    which: Any = int(head) if head.isdecimal() else head
    queries = tuple(query or ["centre"])
    found: list[Shown] = []
    for one in session.subjects:
        # Each network sees the images at its own size, so that different token grids can be compared.
        pictures = choosing.choose(wanted, session.data, one.network, given.skip_bad)
        with watched(images=pictures):
            found.append(work.maps(one, pictures, asked, queries, which, not no_rollout))
    frame = pd.concat([shown.frame() for shown in found], ignore_index=True)

    def draw(image: int, query: int) -> Figure:
        from figures import attention_maps as figures

        return figures.attention_maps(found, image, query)

    drawn = {
        f"-{i}" + (f"-{name.replace(',', '_')}" if len(queries) > 1 else ""): partial(draw, i, q)
        for i in range(len(found[0].names))
        for q, name in enumerate(queries)
    }
    document = {
        "command": "maps",
        "profile": session.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in session.subjects],
        "images": list(found[0].names),
        "left_out": list(pictures.skipped),
        "queries": list(queries),
        "heads": list(found[0].heads),
        "rows": json.loads(frame.to_json(orient="records")),
    }
    labels = "+".join(shown.label for shown in found)
    described = [*(one.id for one in session.subjects), str(asked), head, str(no_rollout), *queries, *found[0].names]
    name = stem(labels, queries[0], *described)
    written = writers.write(folder, name, {"csv": frame.to_csv(index=False)}, document, drawn)
    summary = table("maps", "subject", "layers", "largest weight", "not on patches")
    for shown in found:
        largest = shown.attention.max((-2, -1)).mean((0, 2, 3))
        elsewhere = shown.elsewhere.mean((0, 2, 3))
        spread = [" ".join(f"{value:.2f}" for value in values) for values in (largest, elsewhere)]
        summary.add_row(shown.label, " ".join(map(str, shown.layers)), *spread)
    notes = ["each map from 0 to its own largest weight; by layer, means over images, queries and heads"]
    session.tell([summary], notes, written, document, pictures)


_MOST_IMAGES = 100


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    add(app, "attention-stats", attention_stats)
    add(app, "maps", maps)
