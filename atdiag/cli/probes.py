"""``atdiag probe``: layer-wise probing.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from atdiag.cli.options import Classes
from atdiag.cli.session import SUBJECT, Given, Layers, Shown, add
from atdiag.reports.console import table

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


# --- probe ---------------------------------------------------------------------------------------------------------


def probe(
    given: Given,
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
) -> Shown:
    """Probe every layer for the classes, and exit at each.

    The early exit applies the trained head to every layer. A linear probe (its regularisation chosen on held-out
    training images if each class has two or more), nearest neighbours by cosine, and nearest class means, on class
    token, mean patch token, and both.
    """
    from atdiag.api import analyses

    result = analyses.probe(
        *subjects, layers=layers, train=train, images=images, neighbours=neighbours, classes=classes, **given
    )
    return result, _probe_tables(result.table)


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
