"""What an experiment or an analysis returns in Python. Imports nothing heavy."""

from __future__ import annotations

import base64
import contextvars
import functools
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from atdiag.reports.writers import Drawing, Written

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Result:
    """The answer to an experiment or an analysis; a notebook shows its verdict, table, notes and figures."""

    command: str
    """The name of the command that does the same."""
    table: pd.DataFrame
    verdict: str = ""
    """The answer in words; empty where a command shows, and concludes nothing."""
    runs: tuple[Path, ...] = ()
    """The directories of the runs on which it is based."""
    notes: tuple[str, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What ``--json`` prints, without the files."""
    found: Any = field(default=None, repr=False)
    """All that was found: a :class:`~atdiag.study.protocol.Reading`, or what the function of ``atdiag.analysis``
    returns."""
    drawings: Mapping[str, Drawing] = field(default_factory=dict, repr=False)
    """Functions that make its figures, by the ending of their file names."""
    written: Written | None = field(default=None, repr=False)
    """The files that were written, if a folder was given."""

    def frame(self) -> pd.DataFrame:
        """Return the numbers as a data frame, in full: the content of the CSV."""
        return self.table.copy()

    @functools.cached_property
    def figures(self) -> tuple[Figure, ...]:
        """The figures, drawn when first asked for; ``figures[0].savefig("answer.pdf")`` writes one."""
        from atdiag.reports import drawing

        out = []
        with drawing.defaults():
            for make in self.drawings.values():
                figure = make()
                figure.draw_without_rendering()  # so that ticks and fonts are ours wherever it is saved
                out.append(figure)
        return tuple(out)

    def __str__(self) -> str:
        """Return verdict, table and notes as text."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(filter(None, (self.verdict, self._short().to_string(index=False, na_rep=""), notes)))

    def _short(self) -> pd.DataFrame:
        """Return the table without columns that say the same in each of several rows, or which runs they are from."""
        told = [name for name in self.table if len(self.table) < 2 or self.table[name].astype(str).nunique() > 1]
        return self.table[[name for name in told if name != "runs"]].round(3)

    def _repr_html_(self) -> str:
        from atdiag.reports import drawing, writers

        parts = [f"<p><b>{html.escape(self.verdict)}</b></p>"] if self.verdict else []
        parts.append(self._short().to_html(index=False, na_rep="", max_rows=40, border=0))
        parts += [f"<small>{html.escape(note)}</small><br>" for note in self.notes]
        figures = self.figures
        with drawing.defaults():
            for figure in figures:
                data = base64.b64encode(writers.draw(figure, "png")).decode()
                parts.append(f'<img style="max-width:100%" src="data:image/png;base64,{data}">')
        return "\n".join(parts)


def in_own_context(function: Callable[P, T]) -> Callable[P, T]:
    """Let what a function sets for its context, such as the folder of data sets, end with its call."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        return contextvars.copy_context().run(function, *args, **options)

    return call


def as_sets(settings: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Return settings as ``NAME=VALUE``: a mapping by dotted name (``{"recipe.epochs": 2}``), or as typed."""
    import json

    if settings is None or isinstance(settings, Sequence):
        return list(settings or ())
    return [f"{name}={json.dumps(_plain(value))}" for name, value in settings.items()]


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it: a path as text, numpy's numbers as Python's."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def data_sets(data: Mapping[str, Any] | None) -> list[str]:
    """Return the settings of a data set, such as ``{"name": "larger", "train": 500}``."""
    return as_sets(
        {name if name.startswith("data.") else f"data.{name}": value for name, value in (data or {}).items()}
    )
