"""Write results to files; no other module does."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.runs import write_atomically
from atdiag.reports import document, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading

FIGURE_KINDS = ("png", "pdf")
"""File suffixes of every figure."""

_ORDER = ("csv", "md", "tex", "json", "txt")
"""Order in which the other files of a result are listed."""


def write(
    folder: Path, stem: str, texts: Mapping[str, str], report: Mapping[str, Any], figures: Mapping[str, Figure]
) -> list[Path]:
    """Write a result in every format, and return the files.

    texts: suffix -> content. report: content of ``<stem>.json``, to which the list of ``files`` is added. figures: what
    is appended to the stem -> a figure, written in each of ``FIGURE_KINDS``. All figures are drawn before anything is
    written, and no file of another result is touched.
    """
    drawn = {
        folder / f"{stem}{name}.{kind}": draw(figure, kind) for name, figure in figures.items() for kind in FIGURE_KINDS
    }
    kinds = sorted((*texts, "json"), key=_ORDER.index)
    files = [*(folder / f"{stem}.{kind}" for kind in kinds), *drawn]
    contents = {**texts, "json": json.dumps({**report, "files": [str(path) for path in files]}, indent=1)}
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in drawn.items():
        write_atomically(path, image)
    for kind, text in contents.items():  # JSON last: whoever reads it finds the other files
        write_atomically(folder / f"{stem}.{kind}", text)
    return files


def draw(figure: Figure, kind: str) -> bytes:
    """Render a figure in a format. Equal figures give equal bytes: a PDF holds no creation time."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
    return content.getvalue()


def write_reading(reading: Reading, folder: Path) -> list[Path]:
    """Write a reading: tables, caption, JSON, and the figure that its series names."""
    texts = {
        "csv": tables.frame(reading).to_csv(index=False),
        "md": tables.markdown(reading),
        "tex": tables.latex(reading),
        "txt": document.caption(reading),
    }
    return write(folder, document.slug(reading.series), texts, document.as_json(reading), {"": figure_of(reading)})


def figure_of(reading: Reading) -> Figure:
    """Draw the figure that a series names, by its entry point of ``atdiag.figures``.

    Raises ValueError if none of that name is installed.
    """
    name = reading.series.figure or reading.reports[0].study.figure
    found = [entry for entry in entry_points(group="atdiag.figures") if entry.name == name]
    if not found:
        raise ValueError(f"no figure named {name!r} is installed")
    figure: Figure = found[0].load()(reading if reading.series.figure else reading.reports[0])
    return figure
