"""Tabulate the teachers. Imports no torch, except for user-registered teachers, which timm has to build."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import Network
from atdiag.networks.registry import teachers
from atdiag.networks.registry.published import TIMM, TeacherEntry
from atdiag.networks.registry.published import table as registry_table
from atdiag.networks.registry.specimens import Specimen, specimens
from atdiag.networks.weights import sources

if TYPE_CHECKING:
    from rich.table import Table


def rows(profile: str, family: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each teacher, with everything the registry knows about it.

    Keys: name, family, title, size, source, licence, components, follows, tokens, available and top1 (a miniature's, on
    its test scenes); from the published network: model, image_size, patch, width, depth, heads, classes, class_token,
    registers, mean, std, interpolation, formats, objective, data, paper2026, labels, text, momentum, masking, target,
    augmentation. At mini, ``source``, ``licence``, ``components`` and ``tokens`` are the miniature's.
    """
    families = sorted({row.family for row in teachers.registry().values()})
    if family is not None and family not in families:
        raise UserError(f"unknown family {family!r}{suggest(family, families)} (known: {', '.join(families)})")
    found = [row for row in teachers.registry().values() if family in (None, row.family)]
    return [_mini(row) if profile == "mini" else _published(row) for row in found]


def _published(row: TeacherEntry) -> dict[str, Any]:
    return {
        "name": row.name,
        "family": row.family,
        "title": row.title,
        "size": row.size.upper(),
        "source": row.weights,
        "licence": row.licence,
        "components": None if row.components is None else list(row.components),
        "follows": list(row.follows),
        "tokens": row.tokens,
        "available": _is_here(row),
        "top1": None,
        "model": row.model,
        "arguments": dict(row.arguments),
        "formats": list(row.formats or ()),
        **{name: getattr(row, name) for name in _FACTS},
    }


_FACTS = (
    *("image_size", "patch", "width", "depth", "heads", "classes", "class_token", "registers"),
    *("mean", "std", "interpolation", "objective", "data", "paper2026"),
    *("labels", "text", "momentum", "masking", "target", "augmentation"),
)


def _is_here(row: TeacherEntry) -> bool:
    try:
        return sources.find(teachers.source(row.name)) is not None
    except (sources.WeightsMissingError, UserError):  # a user's teacher whose file or architecture is missing
        return False


def _mini(row: TeacherEntry) -> dict[str, Any]:
    if not teachers.is_published(row.name):  # a user's teacher has no miniature: it takes real images at every profile
        return _published(row)
    path = sources.shipped_path(row.name)
    own = row.name in teachers.miniatures()
    network = teachers.miniature_network(row.name) if own else None
    source = ("shipped" if path.exists() else "missing") if own else f"use {teachers.stand_in(row.name)}"
    return {
        **_published(row),
        "source": source,
        "licence": "Apache-2.0" if own else "",
        **({"components": list(network.components)} if network else {}),
        "tokens": network.tokens if network else None,
        "available": own and path.exists(),
        "top1": _top1(row.name, path) if own and path.exists() else None,
    }


def _top1(name: str, path: Path) -> float | None:
    """Return the accuracy of a shipped file in per cent, as experiments measure it.

    The file's own metadata tell that of the training, before the weights were rounded to half precision; it stands for
    a file that was rebuilt.
    """
    known = registry_table()["shipped"].get(name)
    if known is not None and sources.sha256(path).startswith(known["sha256"]):
        return float(known["top1"])
    found: float | None = sources.metadata(path).get("top1")
    return found


def table(listed: list[dict[str, Any]], profile: str) -> Table:
    """Lay out the rows for a terminal of 80 columns; at mini, only miniatures and users' own teachers."""
    return _mini_table(listed) if profile == "mini" else _published_table(listed, profile)


def _empty(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=title, title_justify="left")


def _mini_table(listed: list[dict[str, Any]]) -> Table:
    shown = [row for row in listed if row["tokens"] is not None or not teachers.is_published(row["name"])]
    out = _empty(f"{len(shown)} teachers, profile mini")
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
            "found when built" if row["components"] is None else "\n".join(row["components"]) or "none",
            "any" if row["tokens"] is None else str(row["tokens"]),
            "yes" if row["available"] else "no",
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            style=None if row["available"] else "dim",
        )
    return out


_ABOUT = 25
"""Width of the column of facts shared by a family: 80 minus the others."""


def _published_table(listed: list[dict[str, Any]], profile: str) -> Table:
    out = _empty(f"{len(listed)} teachers, profile {profile}")
    out.add_column("name", no_wrap=True)
    out.add_column("native components; pre-training", width=_ABOUT)
    for name in ("px/patch", "tokens"):
        out.add_column(name, justify="right", no_wrap=True)
    for name in ("weights", "licence"):
        out.add_column(name, no_wrap=True)
    families: dict[str, list[dict[str, Any]]] = {}
    for row in listed:
        families.setdefault(row["family"], []).append(row)
    for members in families.values():
        # A family's shared facts are spread over its rows, one line each; what is left goes with the last row.
        lines = wrap(_about(members[0]), _ABOUT)
        last = len(members) - 1
        beside = [*lines[:last], *[""] * (last - len(lines)), "\n".join(lines[last:])]
        for row, text in zip(members, beside, strict=True):
            out.add_row(
                row["name"],
                text,
                f"{row['image_size']}/{row['patch']}" if row["image_size"] else "any",
                "" if row["tokens"] is None else str(row["tokens"]),
                "here" if row["available"] else _kind(row["source"]),
                row["licence"].replace("CC-BY-NC-4.0", "CC-BY-NC"),
                style=None if row["available"] else "dim",
                end_section=row is members[last],
            )
    return out


def _kind(source: str) -> str:
    return "hub" if source.startswith(TIMM) else "authors" if "://" in source else "missing"


def _about(row: dict[str, Any]) -> str:
    parts = "found when built" if row["components"] is None else ", ".join(row["components"]) or "none"
    return "; ".join(filter(None, (parts, row["objective"] and f"{row['objective']}, {row['data']}".rstrip(", "))))


def stand_ins(listed: list[dict[str, Any]]) -> list[str]:
    """Return lines such as ``use deit_s for augreg_s, dino_s``: teachers without a miniature, by their substitute."""
    by_stand_in: dict[str, list[str]] = {}
    for row in listed:
        if row["tokens"] is None and row["source"].startswith("use "):
            by_stand_in.setdefault(row["source"], []).append(row["name"])
    return [f"{use} for {', '.join(names)}" for use, names in by_stand_in.items()]


# --- specimens -----------------------------------------------------------------------------------------------------


def specimen_rows() -> list[dict[str, Any]]:
    """Return a row for each specimen.

    Keys: name, planted, summary, made, decoys, operation, available; where its weights are here, components, tokens and
    top1 (as it was pre-trained; None for one that is derived), else None.
    """
    return [_specimen_row(one) for one in specimens().values()]


def _specimen_row(one: Specimen) -> dict[str, Any]:
    here = one.file.exists()
    facts = sources.metadata(one.file) if here else {}
    network = Network(**facts["network"]) if here else None
    return {
        "name": one.name,
        "planted": one.planted,
        "summary": one.summary,
        "made": one.made,
        "decoys": list(one.decoys),
        "operation": None if one.operation is None else one.operation.model_dump(mode="json"),
        "components": None if network is None else list(network.components),
        "tokens": None if network is None else network.tokens,
        "available": here,
        "top1": _top1(one.name, one.file) if here and one.operation is None else None,
    }


def specimen_table(listed: list[dict[str, Any]]) -> Table:
    """Lay out the rows of specimens for a terminal of 80 columns."""
    out = _empty(f"{len(listed)} specimens: miniatures with a planted fault, no evidence about any family")
    out.add_column("name", no_wrap=True)
    out.add_column("planted", max_width=20)
    out.add_column("made", max_width=12)
    out.add_column("native components", min_width=12)
    out.add_column("here", no_wrap=True)
    out.add_column("top-1", justify="right", no_wrap=True, min_width=5)
    for row in listed:
        components = row["components"]
        out.add_row(
            row["name"],
            row["planted"],
            row["made"],
            "" if components is None else "\n".join(components) or "none",
            "yes" if row["available"] else "no",
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            style=None if row["available"] else "dim",
        )
    return out
