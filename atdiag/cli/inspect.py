"""Commands that analyse networks: trace, similarity, intervene. Each wraps a function of ``analysis``.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atdiag.cli import completing
from atdiag.cli.options import Classes
from atdiag.cli.session import SUBJECT, Given, Images, LayerMap, Layers, Shown, add
from atdiag.reports.console import table

if TYPE_CHECKING:
    from rich.table import Table

    from atdiag.analysis.interventions import Outcome
    from atdiag.analysis.similarity import Similarity

Heads = Annotated[str | None, typer.Option(help="Heads, such as 0,2. [default: all]")]


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(
    given: Given,
    subject: Annotated[str, typer.Argument(help=f"What to examine: {SUBJECT}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, .safetensors.")],
    what: Annotated[
        str,
        typer.Option(
            help="Any of map (hook_pattern), logits (hook_attn_scores), q (hook_score_q), k (hook_score_k), "
            "v (hook_v), attn (attn.hook_out), mlp (mlp.hook_out) and residual (hook_resid_post), separated by commas."
        ),
    ] = "map",
    layers: Layers = None,
    heads: Heads = None,
    images: Images = None,
    mean: Annotated[bool, typer.Option("--mean", help="Only the mean over the images.")] = False,
) -> Shown:
    """Write a network's internal values: maps, q, k, v, residual.

    Attention maps, queries, keys, values, outputs of attention and MLP, the residual stream. The file has a tensor for
    each quantity and block, such as map.5 [images, heads, tokens, tokens].
    """
    from atdiag.api import analyses

    result = analyses.trace(subject, what, layers, heads, images, mean, **{**given, "out": out})
    shown = table(f"trace - {result.document['subject']}", "tensor", "shape", "largest |x|", "size")
    for name, shape, largest, size in result.table.itertuples(index=False, name=None):
        shown.add_row(name, shape, f"{largest:.4g}", size)
    return result, [shown]


# --- similarity ----------------------------------------------------------------------------------------------------


def similarity(
    given: Given,
    subject: Annotated[str, typer.Argument(metavar="A", help=f"{SUBJECT[0].upper()}{SUBJECT[1:]}.")],
    others: Annotated[
        list[str], typer.Argument(metavar="B...", help="What it is compared with; several are compared in one pass.")
    ],
    layers: Layers = None,
    layer_map: LayerMap = None,
    images: Images = None,
) -> Shown:
    """Compare two networks' attention, head by head.

    By Jensen-Shannon divergence of the maps, in bits, and CKA of the residual stream, layer by layer. Heads have no
    order: they are matched one to one with the least divergence (optimal), each with its nearest (best), by index
    (same), or averaged first. 0: the same maps; 1: disjoint.
    """
    from atdiag.api import analyses

    result = analyses.similarity(subject, *others, layers=layers, layer_map=layer_map, images=images, **given)
    return result, [_similarity_table(one) for one in result.found]


def _similarity_table(one: Similarity) -> Table:
    """Return a table with a row for each layer: all matchings, optimal ones of class and patch tokens, CKA."""
    shown = table(f"{one.a} and {one.b}", "layer", "optimal", "best", "same", "averaged", "class", "patches", "CKA")
    columns = [one.matched(how) for how in ("optimal", "best", "same", "averaged")]
    none = columns[0] * float("nan")
    columns += [one.matched("optimal", rows) if rows in one.heads else none for rows in ("class", "patch")]
    columns.append(one.cka["all"])
    for i, (layer_a, layer_b) in enumerate(one.layers):
        name = str(layer_a) if layer_a == layer_b else f"{layer_a}:{layer_b}"
        shown.add_row(name, *("-" if column[i] != column[i] else f"{column[i]:.3f}" for column in columns))
    shown.add_section()
    shown.add_row("mean", *("-" if c.mean() != c.mean() else f"{c.mean():.3f}" for c in columns))
    return shown


# --- intervene -----------------------------------------------------------------------------------------------------


def intervene(
    given: Given,
    subject: Annotated[str, typer.Argument(metavar="A", help=f"The network that is changed: {SUBJECT}.")],
    from_: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="B", help="Put in this network's. Repeatable.", autocompletion=completing.subjects
        ),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="Put in: teacher (of a run's student), uniform, identity, shuffled (of another image), no-sinks or "
            "own. Repeatable. [default, without --from: uniform, identity, shuffled, no-sinks]",
        ),
    ] = None,
    what: Annotated[
        str, typer.Option(help="What is replaced: map (hook_pattern), q, k (hook_score_q, _k) or v (hook_v).")
    ] = "map",
    layers: Layers = None,
    heads: Heads = None,
    layer_map: LayerMap = None,
    each: Annotated[bool, typer.Option("--each", help="One block at a time, not all of them at once.")] = False,
    images: Images = None,
    classes: Classes = None,
) -> Shown:
    """Replace a network's attention, and measure the effect.

    Trains nothing. Reports accuracy before and after, and the change of the residual stream, block by block.
    """
    from atdiag.api import analyses

    result = analyses.intervene(subject, from_, with_, what, layers, heads, layer_map, each, images, classes, **given)
    return result, [_outcomes_table(result.found)]


def _outcomes_table(found: Sequence[Outcome]) -> Table:
    from atdiag.core.selection import ranges

    columns = ("put in", "layers", "top-1 %", "points [95 %]", "flips %", "stream")
    shown = table(f"intervene - {found[0].subject}", *columns)
    top1 = found[0].top1
    if top1:
        shown.add_row("(as it is)", "", f"{top1[0]:.1f}", "", "", "")
    for one in found:
        change = "" if one.change is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*one.change)
        accuracy = "" if one.top1 is None else f"{one.top1[1]:.1f}"
        where = ranges(one.layers) + ("" if one.heads is None else f" h{ranges(one.heads)}")
        shown.add_row(one.replaced, where, accuracy, change, f"{one.flips:.1f}", f"{one.residual[-1]:.3f}")
    return shown


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (trace, similarity, intervene):
        add(app, command.__name__, command)
