"""Commands that analyse networks: trace, similarity, intervene. Each wraps a function of ``analysis``.

Part of the command line: imports nothing heavy before a command is called.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atdiag.cli.options import Classes
from atdiag.cli.session import (
    SUBJECT,
    Images,
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
from atdiag.core import paths
from atdiag.core.text import byte_size
from atdiag.reports.console import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from atdiag.analysis.interventions import Outcome
    from atdiag.analysis.replacements import Replacement
    from atdiag.analysis.similarity import Similarity

Heads = Annotated[str | None, typer.Option(help="Heads, such as 0,2. [default: all]")]


# --- trace ---------------------------------------------------------------------------------------------------------


def trace(
    given: InspectionOptions,
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
) -> None:
    """Write a network's internal values: attention maps, queries, keys, values, outputs, the residual stream.

    The file has a tensor for each quantity and block, such as map.5 [images, heads, tokens, tokens].
    """
    from safetensors.torch import save

    from atdiag.analysis import streaming
    from atdiag.core.errors import UserError
    from atdiag.core.runs import write_atomically
    from atdiag.reports.writers import Written

    out = out.expanduser()
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"-o {out} is not the name of a .safetensors file", f"write it as -o {out.stem}.safetensors")
    paths.writable(out.parent, "out")
    session = InspectionSession([subject], given)
    (one,) = session.subjects
    pictures = session.pictures(images, default=64)
    blocks = chosen(layers, one.network.depth, "layers")
    some = chosen(heads, one.network.heads, "heads")
    with watched(images=pictures):
        found = streaming.trace(one, pictures, [name.strip() for name in what.split(",")], blocks, some, mean)
    tensors = {f"{name}.{layer}": tensor.contiguous() for (name, layer), tensor in found.items()}
    kept = [name for name in pictures.names if name not in pictures.skipped]
    header = {"subject": one.label, "id": one.id, "images": json.dumps(kept), "mean": json.dumps(mean)}
    header["left_out"] = json.dumps(list(pictures.skipped))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, save(tensors, header))
    shown = table(f"trace - {one.label}", "tensor", "shape", "largest |x|", "size")
    for name, tensor in tensors.items():
        largest = max(float(tensor.max()), -float(tensor.min()))
        shape = " x ".join(map(str, tensor.shape))
        shown.add_row(name, shape, f"{largest:.4g}", byte_size(tensor.numel() * tensor.element_size()))
    document = {"command": "trace", "subject": one.label, "id": one.id, "images": len(kept), "tensors": list(tensors)}
    document["left_out"] = list(pictures.skipped)
    over = "mean over " if mean else ""
    session.tell([shown], [f"{over}{shown_on(pictures)}"], Written([out]), document, pictures)


# --- similarity ----------------------------------------------------------------------------------------------------


def similarity(
    given: InspectionOptions,
    subject: Annotated[str, typer.Argument(metavar="A", help=f"{SUBJECT[0].upper()}{SUBJECT[1:]}.")],
    others: Annotated[
        list[str], typer.Argument(metavar="B...", help="What it is compared with; several are compared in one pass.")
    ],
    layers: Layers = None,
    layer_map: LayerMap = None,
    images: Images = None,
) -> None:
    """Compare two networks' attention, head by head: Jensen-Shannon divergence by layer, in bits, and CKA.

    Heads have no order: they are matched one to one with the least divergence (optimal), each with its nearest (best),
    by index (same), or averaged first. 0: the same maps; 1: disjoint.
    """
    from atdiag.analysis import similarity as work
    from atdiag.reports import writers

    folder = given.folder("similarity")
    session = InspectionSession([subject, *others], given)
    a, *bs = session.subjects
    pairs = layer_pairs(layer_map)
    blocks = chosen(layers, a.network.depth, "layers")
    work.check(a, bs, blocks, pairs)  # first: other images would not make incompatible networks fit
    pictures = session.pictures(images)
    with watched(images=pictures):
        found = work.similarity(a, bs, pictures, blocks, pairs)
    import pandas as pd

    frame = pd.concat([one.frame() for one in found], ignore_index=True)
    document = {
        "command": "similarity",
        "profile": session.profile,
        "subjects": [{"label": one.label, "id": one.id} for one in session.subjects],
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "layers": [list(pair) for pair in found[0].layers],
        "rows": json.loads(frame.to_json(orient="records")),
        "heads": [{rows: one.heads[rows].round(6).tolist() for rows in one.heads} for one in found],
    }

    def by_layer() -> Figure:
        from figures import similarity as figures

        return figures.by_layer(found)

    def heads(one: Similarity) -> Figure:
        from figures import similarity as figures

        return figures.heads(one)

    drawn = {"-layers": by_layer}
    drawn |= {f"-heads{i if len(found) > 1 else ''}": partial(heads, one) for i, one in enumerate(found, 1)}
    ids = [one.id for one in session.subjects]
    name = stem(a.label, "+".join(one.label for one in bs), *ids, str(found[0].layers), *pictures.names)
    texts = {"csv": frame.to_csv(index=False)}
    written = writers.write(folder, name, texts, document, drawn)
    notes = [f"bits, 0 to 1, mean over queries and {shown_on(pictures)}; CKA of the residual stream, 0 to 1"]
    notes += dict.fromkeys(note for one in found for note in one.notes)
    session.tell([_similarity_table(one) for one in found], notes, written, document, pictures)


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
    given: InspectionOptions,
    subject: Annotated[str, typer.Argument(metavar="A", help=f"The network that is changed: {SUBJECT}.")],
    from_: Annotated[
        list[str] | None, typer.Option("--from", metavar="B", help="Put in this network's. Repeatable.")
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
) -> None:
    """Replace a trained network's attention, without training, and measure the effect.

    Reports accuracy before and after, and the change of the residual stream, block by block.
    """
    from atdiag.analysis import interventions as work
    from atdiag.analysis import subjects
    from atdiag.analysis.replacements import Replacement, check
    from atdiag.reports import writers

    folder = given.folder("intervene")
    session = InspectionSession([subject, *(from_ or ())], given, classes)
    a, *others = session.subjects
    words = with_ or ([] if from_ else ["uniform", "identity", "shuffled", "no-sinks"])
    sources: list[Any] = [*others]
    sources += [subjects.teacher_of(a).to(session.device) if word == "teacher" else word for word in words]
    blocks = chosen(layers, a.network.depth, "layers")
    some = chosen(heads, a.network.heads, "heads")
    pairs = layer_pairs(layer_map)
    groups = [(block,) for block in blocks or sorted(pairs or range(a.network.depth))] if each else [blocks]
    part: Any = what
    replacements: list[Replacement] = [
        Replacement(source, part, group, some, pairs) for source in sources for group in groups
    ]
    for one in replacements:
        check(a, one)
    pictures = session.pictures(images)
    with watched(images=pictures):
        found = work.intervene(a, replacements, pictures)
    frame = work.frame(found)
    head = head_record(found[0].head, found[0].warning)
    document = {
        "command": "intervene",
        "profile": session.profile,
        "subject": {"label": a.label, "id": a.id, "head": head},
        "images": found[0].images,
        "left_out": list(pictures.skipped),
        "rows": json.loads(frame.to_json(orient="records")),
    }

    def residual() -> Figure:
        from figures import interventions as figures

        return figures.residual(found)

    def accuracy() -> Figure:
        from figures import interventions as figures

        return figures.accuracy(found)

    drawn = {"-residual": residual} | ({} if found[0].change is None else {"-accuracy": accuracy})
    said = dict.fromkeys(one.replaced for one in found)
    asked = [(one.replaced, one.layers, one.heads) for one in found]
    name = stem(a.label, "+".join(said), *(one.id for one in session.subjects), str(asked), *pictures.names)
    texts = {"csv": frame.to_csv(index=False)}
    written = writers.write(folder, name, texts, document, drawn)
    notes = [f"{shown_on(pictures)}, the same before and after; 95 % intervals over images (by cluster)"]
    notes.append("stream: how far the last block's output moves, relative to its norm")
    if found[0].change is None:
        notes.append(f"no accuracy: these images have no labels for the classes of its head ({head['rows']})")
    else:
        notes.append(f"which row of its head is which class: {head['rows']}")
        notes += [f"{a.label} is {warning}"] if (warning := head["warning"]) else []
    session.tell([_outcomes_table(found)], notes, written, document, pictures)


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
