"""Networks of the user's as teachers: stored in a file, or trained by a run. Imports nothing heavy.

A file is named by the sha256 of its content, which is also the teacher's identity. Where timm builds the same function
from the architecture's name, the file holds timm's state dict, and the reference is ``timm:MODEL@FILE``, as for any
file. Otherwise it holds our ViT's, with its architecture in the header: ``file:NAME@FILE``, or just the file.

A finished run's student is a teacher, too: ``run:ID``, the beginning of an id being enough, or the run's folder. Its
identity is the sha256 of its weights, so it stays the same teacher in another store.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from atdiag.core import paths
from atdiag.core.errors import UserError
from atdiag.core.runs import DamagedRunError, Run, Store
from atdiag.core.text import count
from atdiag.networks.weights import sources

if TYPE_CHECKING:
    from atdiag.core.spec import Network, Teacher

FILE = "file:"
RUN = "run:"
OURS = (FILE, RUN)
"""Prefixes of the references whose networks are ours, with their architecture beside the weights."""

_ENOUGH = 8
"""Digits of an id that is compared with others: below, a similar one says nothing."""


def network(path: Path) -> Network | None:
    """Return the architecture in a file's header, or of the run whose weights it holds; None if there is none.

    Raises UserError for one that is damaged.
    """
    from atdiag.core.spec import Network

    if path.suffix != ".safetensors" or not path.is_file():
        return None
    if (run := run_of(path)) is not None:
        return _spec_network(run)
    try:
        header = sources.metadata(path)
    except ValueError:  # no header, or another program's
        return None
    if "network" not in header:
        return None
    try:
        return Network.model_validate(header["network"])
    except ValueError as fault:
        raise UserError(f"{path} has no valid architecture in its header ({str(fault).splitlines()[0]})") from None


def reference(path: Path) -> str | None:
    """Return the reference of a run's folder or weights, or of a file that holds its architecture; None for any other.

    Raises UserError for a run that can't teach.
    """
    path = path.expanduser().absolute()
    if (run := run_of(path)) is not None:
        return _of_run(run)
    return None if network(path) is None else f"{FILE}{path.stem}@{path}"


def teacher(reference: str, image_size: int | None, real: bool) -> Teacher:
    """Return the spec of a teacher whose network is ours, at an image size (default: its own).

    reference: with its file. real: whether the images have three channels. Raises UserError if the file is missing, and
    for images that its patches or channels do not fit.
    """
    from atdiag.core.spec import OWN, Teacher

    path = sources.split_reference(reference)[1]
    assert path is not None
    own = network(path)
    if own is None:
        raise UserError(f"{path}: there is no such file, or no architecture in its header{sources.near(path)}")
    if image_size is not None and image_size % own.patch_size:
        raise UserError(
            f"{path.stem} has patches of {own.patch_size} px, and {image_size} px is not a multiple of that",
            f"add `data.image_size`={own.image_size}",
        )
    size = {"image_size": image_size or own.image_size}
    found = Teacher(name=reference, profile=OWN, network=own.model_copy(update=size), sha256=sources.sha256(path))
    if real and image_size is not None and own.channels != 3:
        told = f"{found.label} sees images of {count(own.channels, 'channel')}, and these have 3"
        raise UserError(told, "leave `profile` and `data` out")
    return found


def objective(found: Teacher) -> str | None:
    """Return how a network of :func:`atdiag.pretrain`, or of a run without a transfer, was trained.

    ``supervised`` or ``masked``; None where it is not known, as of a file that is not here.
    """
    if not found.name.startswith(OURS):
        return None
    path = sources.split_reference(found.name)[1]
    if path is None or not path.is_file():
        return None
    if (run := run_of(path)) is not None:
        try:
            spec = run.spec
        except DamagedRunError:
            return None
        plain = spec.transfer.method == "none" and spec.init.source == "scratch" and spec.planted is None
        return ("masked" if spec.masked else "supervised") if plain else None
    try:
        header = sources.metadata(path)
    except ValueError:
        return None
    if "recipe" not in header or "planted" in header:
        return None
    return "masked" if "masked" in header else "supervised"


# --- runs ----------------------------------------------------------------------------------------------------------


def run_of(path: Path) -> Run | None:
    """Return the run that a path is the folder or the weights of; None if there is no run's spec."""
    path = path.expanduser().absolute()
    folder = path if path.is_dir() else path.parent
    whole = path.is_dir() or path.name == Run(folder).weights.name
    return Run(folder) if whole and (folder / "spec.json").is_file() else None


def of_id(typed: str) -> str:
    """Return the reference ``run:ID@FILE`` of a run in the folder of runs (:func:`atdiag.core.paths.runs`).

    typed: ``run:`` and the beginning of an id or a run's folder, or a whole reference. Raises UserError unless it names
    one run that can teach.
    """
    if "@" in typed:
        return typed
    store, prefix = Store(paths.runs()), typed.removeprefix(RUN)
    if not prefix:
        raise UserError(
            f"{typed!r} names no run", f"type {RUN} and the beginning of an id, as 'atdiag runs list' shows it"
        )
    if (run := run_of(Path(prefix))) is not None:
        return _of_run(run)
    try:
        return _of_run(store.find(prefix))
    except UserError as fault:
        if near := _near(prefix, store):
            raise UserError(f"no run in {store.root} named {prefix!r}, did you mean {RUN}{near}?") from None
        raise fault from None


def _near(prefix: str, store: Store) -> str:
    """Return the id of a run of which so many digits are those of a mistyped one that it can't be chance; else ""."""
    known = {run.id[: len(prefix)]: run.id for run in store.list()}
    close = difflib.get_close_matches(prefix.lower(), known, n=1, cutoff=0.75) if len(prefix) >= _ENOUGH else []
    return known[close[0]] if close and prefix != close[0] else ""


def _of_run(run: Run) -> str:
    """Return a run's reference as a teacher. Raises UserError if it can't teach."""
    _spec_network(run)  # first: without a sound spec nothing else can be said
    if not run.finished:
        raise UserError(
            f"run {run.id} is not finished: no teacher yet", "the same experiment finishes it; 'atdiag runs list' tells"
        )
    if run.spec.transfer.method == "copy":
        teacher = run.spec.teacher
        told = "" if teacher is None else f", {teacher.label}"
        raise UserError(
            f"run {run.id} copies its teacher's maps, so it has none of its own to teach",
            f"take its teacher{told}, or a run without copying",
        )
    if not run.weights.is_file():
        raise UserError(
            f"run {run.id} has no weights: {run.weights} is missing",
            f"'atdiag runs remove {run.id}' and the same experiment train it again",
        )
    return f"{RUN}{run.id}@{run.weights.absolute()}"


def _spec_network(run: Run) -> Network:
    try:
        return run.spec.network
    except DamagedRunError as fault:
        raise UserError(str(fault)) from None
