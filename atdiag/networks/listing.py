"""The teachers as a table. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from atdiag.networks import teachers, weights
from atdiag.words import UserError, suggest

if TYPE_CHECKING:
    from rich.table import Table


def rows(profile: str, family: str | None = None) -> list[dict[str, Any]]:
    """A row for each teacher: name, family, title, size, source, licence, components, tokens, available, top1.

    At mini ``source`` is the shipped file, or the miniature that stands for the architecture; elsewhere the published
    weights. ``top1`` is a miniature's own accuracy on its test scenes.
    """
    families = sorted({row.family for row in teachers.registry().values()})
    if family is not None and family not in families:
        raise UserError(f"unknown family {family!r}{suggest(family, families)} (known: {', '.join(families)})")
    found = [row for row in teachers.registry().values() if family in (None, row.family)]
    return [_mini(row) if profile == "mini" else _published(row) for row in found]


def _published(row: teachers.Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "family": row.family,
        "title": row.title,
        "size": row.size.upper(),
        "source": row.weights,
        "licence": row.licence,
        "components": list(row.components),
        "tokens": row.tokens,
        "available": False,
        "top1": None,
    }


def _mini(row: teachers.Row) -> dict[str, Any]:
    path = weights.shipped_path(row.name)
    own = row.name in teachers.miniatures()
    source = ("shipped" if path.exists() else "missing") if own else f"use {teachers.stand_in(row.name)}"
    network = teachers.miniature_network(row.name) if own else None
    return {
        **_published(row),
        "source": source,
        "licence": "Apache-2.0" if own else "",
        "components": list(network.components if network else row.components),
        "tokens": network.tokens if network else None,
        "available": own and path.exists(),
        "top1": weights.metadata(path)["top1"] if own and path.exists() else None,
    }


def table(listed: list[dict[str, Any]], profile: str) -> Table:
    """The rows for a terminal of 80 columns; at mini, those that have a miniature of their own."""
    from rich import box
    from rich.table import Table

    shown = [row for row in listed if row["tokens"] is not None]
    out = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    out.add_column("name", no_wrap=True)
    out.add_column("family", max_width=12)
    out.add_column("weights, licence", overflow="fold")
    out.add_column("native components", min_width=14)
    out.add_column("tokens", justify="right", no_wrap=True)
    out.add_column("here", no_wrap=True)
    out.add_column("top-1", justify="right", no_wrap=True, min_width=5)
    for row in shown:
        out.add_row(
            row["name"],
            row["title"],
            f"{row['source']}, {row['licence']}",
            "\n".join(row["components"]) or "none",
            str(row["tokens"]),
            "yes" if row["available"] else "no",
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            style=None if row["available"] else "dim",
        )
    out.title, out.title_justify = f"{len(shown)} teachers, profile {profile}", "left"
    return out


def stand_ins(listed: list[dict[str, Any]]) -> list[str]:
    """``use deit_s for augreg_s, dino_s``: the teachers without a miniature, by what stands for their architecture."""
    by_stand_in: dict[str, list[str]] = {}
    for row in listed:
        if row["tokens"] is None:
            by_stand_in.setdefault(row["source"], []).append(row["name"])
    return [f"{use} for {', '.join(names)}" for use, names in by_stand_in.items()]
