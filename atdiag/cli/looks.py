"""Commands that show attention: attention-stats, maps.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atdiag.cli.session import SUBJECT, Given, Images, Layers, Shown, add
from atdiag.reports.console import table

if TYPE_CHECKING:
    from rich.table import Table

    from atdiag.analysis.statistics import Stats


Subjects = Annotated[
    list[str],
    typer.Argument(metavar="SUBJECT...", help=f"What to examine: {SUBJECT}; several are shown side by side."),
]


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
) -> Shown:
    """Summarise attention by layer and head in numbers.

    For several subjects side by side: entropy, attention distance, share on class token and registers, sinks,
    redundancy of heads, effective rank, high-norm tokens. The module atdiag.analysis.statistics defines each and
    gives its source.
    """
    from atdiag.api import looks

    result = looks.attention_stats(
        *subjects, layers=layers, images=images, threshold=threshold, rank_images=rank_images, **given
    )
    return result, [_stats_table(one) for one in result.found]


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
    no_rollout: Annotated[bool, typer.Option("--no-rollout", help="Omit the attention rollout.")] = False,
) -> Shown:
    """Draw attention maps of subjects side by side.

    Subjects in rows, layers in columns, a figure for each image and query.

    Each row ends with the attention rollout up to its last layer.
    """
    from atdiag.api import looks

    result = looks.maps(
        *subjects, images=images, layers=layers, query=query or (), head=head, no_rollout=no_rollout, **given
    )
    summary = table("maps", "subject", "layers", "largest weight", "not on patches")
    for shown in result.found:
        largest = shown.attention.max((-2, -1)).mean((0, 2, 3))
        elsewhere = shown.elsewhere.mean((0, 2, 3))
        spread = [" ".join(f"{value:.2f}" for value in values) for values in (largest, elsewhere)]
        summary.add_row(shown.label, " ".join(map(str, shown.layers)), *spread)
    return result, [summary]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    add(app, "attention-stats", attention_stats)
    add(app, "maps", maps)
