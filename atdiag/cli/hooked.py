"""Commands on hook points: hooks lists them, patch puts one network's values into another's run.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli.options import Classes
from atdiag.cli.session import (
    SUBJECT,
    InspectionOptions,
    InspectionSession,
    LayerMap,
    Layers,
    add,
    chosen,
    head_record,
    layer_pairs,
    shown_on,
    stem,
    watched,
)
from atdiag.reports.console import show_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from atdiag.hooks.patches import Patched


# --- hooks ---------------------------------------------------------------------------------------------------------


def hooks(
    given: InspectionOptions,
    subject: Annotated[str, typer.Argument(help=f"What to examine: {SUBJECT}.")],
) -> None:
    """List a network's hook points with their shapes, and what it lacks.

    atdiag.hooked(SUBJECT) gives it TransformerLens's interface: run_with_cache, run_with_hooks.
    """
    from rich.console import Console

    from atdiag.analysis.points.layout import points_by_leaf
    from atdiag.analysis.points.names import TRACED
    from atdiag.analysis.points.running import Runner
    from atdiag.core.selection import ranges

    session = InspectionSession([subject], given)
    (one,) = session.subjects
    runner = Runner(one)
    layout = runner.layout
    runner.close()
    depth = one.network.depth
    traced = {leaf: name for name, leaf in TRACED.items()}
    shown = table(f"hooks - {one.label}", "point", "shape", "in trace")
    rows: list[dict[str, Any]] = []
    for leaf, (layers, shape) in points_by_leaf(layout).items():
        where = "" if len(layers) in (0, depth) else f" ({ranges(layers)})"
        name = f"blocks.{{l}}.{leaf}{where}" if layers else leaf
        shown.add_row(name, " x ".join(map(str, shape)), traced.get(leaf, ""))
        rows.append({"name": leaf, "blocks": layers or None, "shape": list(shape)})
    lacks: dict[str, list[str]] = {}
    for leaf, why in _missing(layout.missing).items():
        lacks.setdefault(why, []).append(leaf)
    show_table(shown)
    terminal = Console()
    notes = [f"{len(layout.shapes)} points; blocks l = 0 to {depth - 1}"]
    notes += [f"lacks {', '.join(names)}: {why}" for why, names in lacks.items()]
    notes += [one.note] if one.note else []
    for note in notes:
        terminal.print(f"- {note}", style="dim", highlight=False)
    if given.json_:
        missing = [{"name": name, "why": why} for why, names in lacks.items() for name in names]
        facts = {"command": "hooks", "subject": one.label, "id": one.id, "depth": depth}
        typer.echo(json.dumps({**facts, "points": rows, "missing": missing}))


def _missing(missing: dict[str, str]) -> dict[str, str]:
    """Return the name within a block of everything that some block lacks, and why."""
    from atdiag.analysis.points.names import leaf_of

    return {leaf_of(name): why for name, why in missing.items() if "hook_" in name}


# --- patch ---------------------------------------------------------------------------------------------------------


def patch(
    given: InspectionOptions,
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
) -> None:
    """Put one network's values into another's run, one head (or position) at a time, and map the effect.

    Activation patching: each patch changes one place, and the rest of A runs on from there.
    """
    from atdiag.core.errors import UserError
    from atdiag.hooks import patches as work
    from atdiag.reports import writers

    folder = given.folder("patch")
    session = InspectionSession([subject, other], given, classes)
    a, b = session.subjects
    pairs = layer_pairs(layer_map)
    blocks = chosen(layers, a.network.depth, "layers")
    work.check(a, b, what, by, blocks, pairs)
    if measure not in work.MEASURES:
        raise UserError(f"--measure {measure!r} is not one of {', '.join(work.MEASURES)}")
    if subject == other and from_images is None:
        raise UserError("A and B are one network on the same images", "give --from-images, or another B")
    pictures = session.pictures(images, default=64)
    others = None if from_images is None else session.pictures(from_images)
    chosen_by: Any = by
    chosen_measure: Any = measure
    with watched(images=pictures):
        found = work.patch(a, b, pictures, what, chosen_by, chosen_measure, blocks, pairs, others)
    frame = found.frame()
    head = head_record(found.head, "")
    document = {
        "command": "patch",
        "profile": session.profile,
        "a": {"label": a.label, "id": a.id, "head": head},
        "b": {"label": b.label, "id": b.id},
        "what": found.what,
        "by": found.by,
        "measure": found.measure,
        "images": found.images,
        "left_out": list(pictures.skipped),
        "rows": json.loads(frame.to_json(orient="records")),
    }

    def effects() -> Figure:
        from figures import patches as figures

        return figures.effects(found)

    asked = [found.what, by, measure, str(found.layers), *pictures.names, *(others.names if others else ())]
    name = stem(a.label, b.label, a.id, b.id, *asked)
    written = writers.write(folder, name, {"csv": frame.to_csv(index=False)}, document, {"": effects})
    notes = [
        f"{shown_on(pictures)}; {_explained(found)}; 95 % intervals over images (by cluster), not over the patches"
    ]
    if found.labelled:
        notes.append(f"which row of its head is which class: {head['rows']}")
    else:
        notes.append("the class is the unchanged network's prediction: these images have no labels for its head")
    session.tell([_table(found)], notes, written, document, pictures)


def _explained(found: Patched) -> str:
    unit = {"margin": "the class's logit minus the mean of the others", "top1": "top-1 in per cent", "loss": "nats"}
    return f"{found.measure}: {unit[found.measure]}, {found.before.mean():.2f} before"


def _table(found: Patched, most: int = 12) -> Table:
    """Return the patches with the largest effects."""
    kind = [] if found.by == "layer" else [found.by]
    shown = table(f"patch - {found.what} of {found.b} into {found.a}", "block", *kind, found.measure, "change [95 %]")
    frame = found.frame()
    for row in frame.loc[frame.change.abs().sort_values(ascending=False, kind="stable").index[:most]].itertuples():
        place: Sequence[str] = [str(getattr(row, found.by))] if kind else []
        change = f"{row.change:+.2f} [{row.ci_low:+.2f}, {row.ci_high:+.2f}]"
        shown.add_row(str(row.layer), *place, f"{row.after:.2f}", change)
    if len(frame) > most:
        shown.add_section()
        shown.add_row(f"({len(frame) - most} smaller)", *[""] * (len(kind) + 2))
    return shown


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (hooks, patch):
        add(app, command.__name__, command)
