"""The analyses on hook points: hooks lists a network's, patch puts one network's values into another's run.

Each is the command of its name. ``atdiag.hooked`` gives a network TransformerLens's interface, and ``atdiag.patching``
its functions for activation patching. Imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from atdiag.api.given import CommonOptions, Indices, answer, open_analysis, runs_of, typed, wanted_images
from atdiag.api.results import Result, in_own_context
from atdiag.api.sessions import chosen, head_record, layer_pairs, shown_on, stem, watched
from atdiag.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from atdiag.hooks.patches import Patched


@in_own_context
def hook_points(subject: str | Path | nn.Module, **common: Unpack[CommonOptions]) -> Result:
    """Return a network's hook points with their shapes; the notes say what it lacks, and why."""
    import pandas as pd

    from atdiag.analysis.points.layout import points_by_leaf
    from atdiag.analysis.points.names import TRACED, leaf_of
    from atdiag.analysis.points.running import Runner
    from atdiag.core.selection import ranges

    session = open_analysis([subject], common)
    (one,) = session.subjects
    runner = Runner(one)
    layout = runner.layout
    runner.close()
    depth = one.network.depth
    traced = {leaf: name for name, leaf in TRACED.items()}
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for leaf, (layers, shape) in points_by_leaf(layout).items():
        where = "" if len(layers) in (0, depth) else f" ({ranges(layers)})"
        name = f"blocks.{{l}}.{leaf}{where}" if layers else leaf
        rows.append({"point": name, "shape": " x ".join(map(str, shape)), "in trace": traced.get(leaf, "")})
        points.append({"name": leaf, "blocks": layers or None, "shape": list(shape)})
    lacks: dict[str, list[str]] = {}
    for leaf, why in {leaf_of(name): why for name, why in layout.missing.items() if "hook_" in name}.items():
        lacks.setdefault(why, []).append(leaf)
    notes = [f"{len(layout.shapes)} points; blocks l = 0 to {depth - 1}"]
    notes += [f"lacks {', '.join(names)}: {why}" for why, names in lacks.items()]
    notes += [one.note] if one.note else []
    missing = [{"name": name, "why": why} for why, names in lacks.items() for name in names]
    facts = {"command": "hooks", "subject": one.label, "id": one.id, "depth": depth}
    document = {**facts, "points": points, "missing": missing}
    return Result("hooks", pd.DataFrame(rows), "", runs_of(session), tuple(notes), document, layout)


@in_own_context
def patch(
    subject: str | Path | nn.Module,
    other: str | Path | nn.Module,
    what: str = "z",
    by: str = "head",
    measure: str = "margin",
    layers: Indices = None,
    layer_map: str | None = None,
    images: Any = None,
    from_images: Any = None,
    classes: Path | None = None,
    **common: Unpack[CommonOptions],
) -> Result:
    """Put one network's values into another's run, one head (or position, or layer) at a time.

    subject: the network that is changed; other: whose values are put in. what: the point, such as z, pattern, q,
    resid_pre. measure: margin, top1 or loss. from_images: images on which ``other`` is run; default: the same.
    """
    from atdiag.hooks import patches as work

    session = open_analysis([subject, other], common, classes)
    a, b = session.subjects
    pairs = layer_pairs(layer_map)
    blocks = chosen(typed(layers), a.network.depth, "layers")
    work.check(a, b, what, by, blocks, pairs)
    if measure not in work.MEASURES:
        raise UserError(f"`measure` {measure!r} is not one of {', '.join(work.MEASURES)}")
    if subject == other and from_images is None:
        raise UserError("A and B are one network on the same images", "give `from_images`, or another B")
    pictures = session.pictures(wanted_images(images), default=64)
    others = None if from_images is None else session.pictures(wanted_images(from_images))
    chosen_by: Any = by
    chosen_measure: Any = measure
    with watched(images=pictures):
        found = work.patch(a, b, pictures, what, chosen_by, chosen_measure, blocks, pairs, others)
    frame = found.frame()
    head = head_record(found.head, "", session.given.spoken)
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

    notes = [
        f"{shown_on(pictures)}; {_explained(found)}; 95 % intervals over images (by cluster), not over the patches",
        f"which row of its head is which class: {head['rows']}"
        if found.labelled
        else "the class is the unchanged network's prediction: these images have no labels for its head",
    ]
    if frame.ci_low.isna().any():
        notes.append("too few images for an interval: all are of one cluster")
    asked = [found.what, by, measure, str(found.layers), *pictures.names, *(others.names if others else ())]
    name = stem(a.label, b.label, a.id, b.id, *asked)
    return answer(session, "patch", frame, "", notes, document, found, {"": effects}, name, pictures)


def _explained(found: Patched) -> str:
    unit = {"margin": "the class's logit minus the mean of the others", "top1": "top-1 in per cent", "loss": "nats"}
    return f"{found.measure}: {unit[found.measure]}, {found.before.mean():.2f} before"
