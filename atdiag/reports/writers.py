"""Write results to files; no other module does."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atdiag.core.runs import write_atomically
from atdiag.reports import document, drawing, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atdiag.study.protocol import Reading

FIGURE_KINDS = ("png", "pdf")
"""File suffixes of every figure."""

Drawing = Callable[[], "Figure"]
"""A function that makes a figure."""

_ORDER = ("html", "csv", "md", "tex", "json", "txt")
"""Order in which the other files of a result are listed."""


@dataclass(frozen=True)
class Written:
    """The outcome of writing a result: its files, and the figures that could not be drawn."""

    files: Sequence[Path]
    missing: Mapping[str, str] = field(default_factory=dict)
    """A figure's file -> why it is missing."""

    def record(self) -> dict[str, Any]:
        """Return a JSON record: ``files``, and ``missing`` with the reasons."""
        return {"files": [str(path) for path in self.files], "missing": dict(self.missing)}


def write(
    folder: Path, stem: str, texts: Mapping[str, str], report: Mapping[str, Any], figures: Mapping[str, Drawing]
) -> Written:
    """Write a result in every format.

    texts: file ending -> content. report: the content of ``<stem>.json``, with :meth:`Written.record` added. figures:
    suffix of the stem -> function that makes a figure, written as each of ``FIGURE_KINDS``. All figures are drawn
    before anything is written, and files of other results are not touched.

    A figure that can't be drawn does not affect the rest: it is reported on standard error and in the JSON. An older
    file of its name would not match the table, so it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[Path, bytes] = {}
    missing: dict[str, str] = {}
    for name, make in figures.items():
        paths = {kind: folder / f"{stem}{name}.{kind}" for kind in FIGURE_KINDS}
        try:
            with drawing.defaults():
                figure = make()
                drawn |= {path: draw(figure, kind) for kind, path in paths.items()}
        except Exception as fault:
            why = " ".join(f"{type(fault).__name__}: {fault}".split())
            missing |= {str(path): why for path in paths.values()}
            print(f"atdiag: the figure {paths[FIGURE_KINDS[0]]} can't be drawn ({why})", file=sys.stderr)
            for path in paths.values():
                path.unlink(missing_ok=True)
    kinds = sorted((*texts, "json"), key=_ORDER.index)
    written = Written([*(folder / f"{stem}.{kind}" for kind in kinds), *drawn], missing)
    for kind, text in texts.items():
        write_atomically(folder / f"{stem}.{kind}", text)
    for path, image in drawn.items():
        write_atomically(path, image)
    # The JSON last, so that a reader of it finds the other files.
    write_atomically(folder / f"{stem}.json", json.dumps({**report, **written.record()}, indent=1))
    return written


def draw(figure: Figure, kind: str) -> bytes:
    """Render a figure in a format. Equal figures give equal bytes: a PDF holds no creation time."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
    return content.getvalue()


def write_reading(reading: Reading, folder: Path) -> Written:
    """Write a reading: tables, caption, JSON, and the figure that its series names."""
    stem = document.slug(reading.series)
    texts = {
        "csv": tables.frame(reading).to_csv(index=False),
        "md": tables.markdown(reading),
        "tex": tables.latex(reading, document.headline(reading), f"tab:{stem}"),
        "txt": document.caption(reading),
    }
    return write(folder, stem, texts, document.as_json(reading), {"": lambda: figure_of(reading)})


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
