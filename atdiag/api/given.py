"""What all analyses share: their options, what may be given for subjects, images and blocks, and the result.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from atdiag.api.results import Result, as_sets, data_sets
from atdiag.api.sessions import InspectionOptions, InspectionSession
from atdiag.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from atdiag.analysis.images import ImageSet
    from atdiag.reports.writers import Drawing

Indices = str | int | Sequence[int] | None
"""Blocks or heads: ``"0,5-7"``, ``"top:4"``, ``(0, 5)``; None: all."""


class CommonOptions(TypedDict, total=False):
    """Options of all analyses."""

    label: Sequence[str] | None
    """The subjects' names in tables and figures, in order."""
    skip_bad: bool
    """Leave out images that can't be read, and count them."""
    data: str | Path | Mapping[str, Any] | None
    """The data set: a name, a folder, or settings. Default: the one that a run was trained on, else the profile's."""
    split: float | None
    """The share of a folder's images to hold out for the test, if it has no test part."""
    settings: Mapping[str, Any] | Sequence[str] | None
    """Other settings, such as ``{"data.clutter": 6}``."""
    data_dir: Path | None
    """The folder of all data sets."""
    profile: str | None
    runs: Path | None
    """The folder of runs."""
    device: str | None
    out: Path | None
    """A folder for tables and figures (of ``trace``: a file). Default: nothing is written."""
    spoken: Callable[[str], str]


def open_analysis(references: Sequence[Any], common: CommonOptions, classes: Path | None = None) -> InspectionSession:
    """Open a session for some subjects. Raises UserError, before loading any, for a folder that can't be written."""
    if not references:
        raise UserError("no subject is named", "give a teacher, a run, a file or a network")
    given: dict[str, Any] = {**common}
    data = given.pop("data", None)
    if isinstance(data, str | Path):
        given["data"], data = str(data), None
    sets = [*data_sets(data), *as_sets(given.pop("settings", None))]
    for name in ("data_dir", "runs", "out"):
        given[name] = None if given.get(name) is None else Path(given[name])
    label = given.get("label")
    options = InspectionOptions(**{**given, "set_": sets, "label": [label] if isinstance(label, str) else label})
    options.folder()
    return InspectionSession([str(r) if isinstance(r, Path) else r for r in references], options, classes)


def answer(
    session: InspectionSession,
    command: str,
    frame: pd.DataFrame,
    verdict: str,
    notes: Sequence[str],
    document: Mapping[str, Any],
    found: Any,
    drawings: Mapping[str, Drawing],
    name: str,
    pictures: ImageSet,
) -> Result:
    """Return a result, after writing it if a folder was given."""
    from atdiag.reports import writers

    folder, written = session.given.folder(), None
    if folder is not None:
        written = writers.write(folder, name, {"csv": frame.to_csv(index=False)}, document, drawings)
    said = (*notes, *session.notes(pictures))
    return Result(command, frame, verdict, runs_of(session), said, document, found, drawings, written)


def runs_of(session: InspectionSession) -> tuple[Path, ...]:
    """Return the directories of the subjects that are runs of the session's store."""
    found = [session.store.root / one.id for one in session.subjects if one.spec is not None]
    return tuple(dict.fromkeys(path for path in found if path.is_dir()))


def typed(indices: Indices) -> str | None:
    """Return blocks or heads as they are typed on the command line."""
    if indices is None or isinstance(indices, str):
        return indices
    return str(indices) if isinstance(indices, int) else ",".join(map(str, indices))


def wanted_images(images: Any) -> list[str] | None:
    """Return images as they are typed: one text for each file, or one for all indices."""
    if images is None:
        return None
    parts = [images] if isinstance(images, int | str | Path) else list(images)
    if len(parts) > 0 and not isinstance(images, int) and all(isinstance(part, int) for part in parts):
        return [",".join(map(str, parts)) + ","]
    return [str(part) for part in parts]


def several(given: Any) -> list[Any]:
    """Return what may be one thing or several as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
