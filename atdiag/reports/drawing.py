"""Draw with matplotlib whatever the user's settings of it are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

_NOT_OURS = ("backend", "backend_fallback", "interactive")
"""Settings of the session that draws: they decide nothing about a figure in a file."""


def import_matplotlib() -> ModuleType:
    """Import matplotlib without MPLBACKEND: with the name of no backend in it, even the import would fail.

    A notebook's kernel leaves its own backend there for whatever it starts; no figure here needs one.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """Matplotlib's own defaults and its backend for files while it lasts, whatever the user's matplotlibrc and the
    environment's MPLBACKEND say; then as before.

    A text's font or use of LaTeX is read when it is made, and ticks are made when a figure is drawn: figures are both
    made and drawn in here.
    """
    matplotlib = import_matplotlib()
    settings = matplotlib.rcParams
    backend = dict.__getitem__(settings, "backend")  # plain access would resolve it
    with matplotlib.rc_context():
        settings.update({k: v for k, v in matplotlib.rcParamsDefault.items() if k not in _NOT_OURS})
        dict.__setitem__(settings, "backend", "agg")
        try:
            yield
        finally:
            dict.__setitem__(settings, "backend", backend)
