"""Commands on hook points: hooks lists them, patch puts one network's values into another's run.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Annotated

import typer

from atdiag.cli.options import Classes
from atdiag.cli.session import SUBJECT, Given, LayerMap, Layers, Shown, add
from atdiag.reports.console import table

if TYPE_CHECKING:
    from rich.table import Table

    from atdiag.hooks.patches import Patched


def hooks(
    given: Given,
    subject: Annotated[str, typer.Argument(help=f"What to examine: {SUBJECT}.")],
) -> Shown:
    """List a network's hook points with their shapes.

    Also what it lacks. atdiag.hooked(SUBJECT) gives it TransformerLens's interface: run_with_cache, run_with_hooks.
    """
    from atdiag.api import points

    result = points.hook_points(subject, **{**given, "out": None})
    shown = table(f"hooks - {result.document['subject']}", *result.table.columns)
    for row in result.table.itertuples(index=False):
        shown.add_row(*row)
    return result, [shown]


def patch(
    given: Given,
    subject: Annotated[str, typer.Argument(metavar="A", help=f"The network that is changed: {SUBJECT}.")],
    other: Annotated[
        str, typer.Argument(metavar="B", help="Whose values are put in; A itself for its own, on other images.")
    ],
    what: Annotated[
        str, typer.Option(help="The point: z (heads' outputs), pattern, q, k, v, resid_pre, attn_out, mlp_out ...")
    ] = "z",
    by: Annotated[str, typer.Option(help="One patch for each head, position or layer.")] = "head",
    measure: Annotated[
        str,
        typer.Option(help="margin (the class's logit minus the others' mean), top1 or loss."),
    ] = "margin",
    layers: Layers = None,
    layer_map: LayerMap = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="A number of test images, indices, a folder, or files. [default: 64]"),
    ] = None,
    from_images: Annotated[
        list[str] | None,
        typer.Option("--from-images", help="As many images on which B is run. [default: the same]"),
    ] = None,
    classes: Classes = None,
) -> Shown:
    """Put one network's values into another's run, head by head.

    Activation patching: each patch changes one place (a head, a position or a layer), the rest of A runs on from
    there, and the effect is mapped.
    """
    from atdiag.api import points

    result = points.patch(
        subject,
        other,
        what=what,
        by=by,
        measure=measure,
        layers=layers,
        layer_map=layer_map,
        images=images,
        from_images=from_images,
        classes=classes,
        **given,
    )
    return result, [_table(result.found)]


def _table(found: Patched, most: int = 12) -> Table:
    """Return the patches with the largest effects."""
    kind = [] if found.by == "layer" else [found.by]
    shown = table(f"patch - {found.what} of {found.b} into {found.a}", "block", *kind, found.measure, "change [95 %]")
    frame = found.frame()
    for row in frame.loc[frame.change.abs().sort_values(ascending=False, kind="stable").index[:most]].to_dict(
        "records"
    ):
        place: Sequence[str] = [str(row[found.by])] if kind else []
        interval = "" if isnan(row["ci_low"]) else f" [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
        change = f"{row['change']:+.2f}{interval}"
        shown.add_row(str(row["layer"]), *place, f"{row['after']:.2f}", change)
    if len(frame) > most:
        shown.add_section()
        shown.add_row(f"({len(frame) - most} smaller)", *[""] * (len(kind) + 2))
    return shown


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (hooks, patch):
        add(app, command.__name__, command)
