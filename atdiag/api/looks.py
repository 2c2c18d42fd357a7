"""The analyses that show attention: attention_stats, maps. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from atdiag.api.given import CommonOptions, Indices, answer, open_analysis, several, typed, wanted_images
from atdiag.api.results import Result, in_own_context
from atdiag.api.sessions import chosen_of_all, shown_on, stem, watched
from atdiag.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from atdiag.reports.writers import Drawing


@in_own_context
def attention_stats(
    *subjects: str | Path | nn.Module,
    layers: Indices = None,
    images: Any = None,
    threshold: float | None = None,
    rank_images: int = 64,
    **common: Unpack[CommonOptions],
) -> Result:
    """Summarise attention by layer and head: entropy, distance, sinks, redundancy, effective rank, high-norm tokens.

    threshold: the norm above which a token is high-norm; default: 4 times the image's median. rank_images: images for
    the effective rank, which is slow. :mod:`atdiag.analysis.statistics` defines each number.
    """
    import pandas as pd

    from atdiag.analysis import statistics as work

    if rank_images < 1 or (threshold is not None and not threshold > 0):
        raise UserError("`rank_images` and `threshold` are positive numbers")
    session = open_analysis(subjects, common)
    asked = chosen_of_all(typed(layers), session.subjects)
    pictures = session.pictures(wanted_images(images))
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

    high = f"above {threshold:g}" if threshold is not None else f"above {work.HIGH_NORM:g} x the image's median"
    notes = [
        f"{shown_on(pictures)} (effective rank: {found[0].rank_images}); means over heads, each head in the CSV",
        "entropy in bits; dist: attention distance in pixels; cls, regs: attention on the class token, on registers",
        "sink: share of the most attended token; heads: mean divergence between heads, in bits; rank: effective rank",
        f"high: share of tokens whose norm is {high}; norm: median norm of the patches",
    ]
    name = stem(labels, shown_on(pictures), *described)
    return answer(session, "attention-stats", frame, "", notes, document, found, {"": draw}, name, pictures)


_MOST_IMAGES = 100


@in_own_context
def maps(
    *subjects: str | Path | nn.Module,
    images: Any = None,
    layers: Indices = None,
    query: str | Sequence[str] = ("centre",),
    head: str | int = "mean",
    no_rollout: bool = False,
    **common: Unpack[CommonOptions],
) -> Result:
    """Draw attention maps: subjects in rows, layers in columns, a figure for each image and query.

    images: by default the first test image. query: whose attention, centre, cls, or ``"x,y"`` in pixels. head: mean,
    all, or a number.
    """
    import pandas as pd

    from atdiag.analysis import images as choosing
    from atdiag.analysis import maps as work

    head = str(head)
    if head not in ("mean", "all") and not head.isdecimal():
        raise UserError(f"`head` {head!r}", "give mean, all, or a number")
    wanted = wanted_images(images) or ["0"]
    if all(re.fullmatch(r"[\d\s,-]+", text) and not Path(text).exists() for text in wanted):
        wanted = [",".join([*wanted, ""])]  # trailing comma: indices rather than a number of images
    meant = choosing.named(wanted)
    assert not isinstance(meant, int)
    if len(meant) > _MOST_IMAGES:  # fail before networks are loaded
        raise UserError(f"{len(meant)} images are {len(meant)} figures", f"give at most {_MOST_IMAGES}")
    session = open_analysis(subjects, common)
    asked = chosen_of_all(typed(layers), session.subjects)
    which: Any = int(head) if head.isdecimal() else head
    queries = tuple(several(query) or ["centre"])
    found: list[Any] = []
    for one in session.subjects:
        # Each network sees the images at its own size, so that different token grids can be compared.
        pictures = choosing.choose(wanted, session.data, one.network, session.given.skip_bad)
        with watched(images=pictures):
            found.append(work.maps(one, pictures, asked, queries, which, not no_rollout))
    frame = pd.concat([shown.frame() for shown in found], ignore_index=True)

    def draw(image: int, query: int) -> Figure:
        from figures import attention_maps as figures

        return figures.attention_maps(found, image, query)

    drawn: dict[str, Drawing] = {
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
    notes = ["each map from 0 to its own largest weight; by layer, means over images, queries and heads"]
    name = stem(labels, queries[0], *described)
    return answer(session, "maps", frame, "", notes, document, found, drawn, name, pictures)
