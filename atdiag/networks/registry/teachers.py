"""The registry of teachers: a table (``teachers.toml``) and look-ups in it.

A *reference* names a teacher:

=========================  ============================================================================================
``clip_b``                 a row of the registry: its miniature at profile mini, else its published network
``hub``                    a specimen, at profile mini: a miniature with a planted fault (``specimens``)
``clip_b@/path/file``      the published network with the weights of that file (``#ema``: their moving average)
``timm:MODEL``             any softmax-attention ViT of timm, with its weights from the hub
``timm:MODEL@/path/file``  the same with the weights of that file
``/path/file``             a weight file or folder that tells its model (``recognition``)
``hf-hub:NAME``            a folder in timm's layout or transformers', or one in the hub's cache
``vit:NAME@/path/file``    the network that keys, shapes and ``config.json`` tell (see ``reading``); NAME is for tables
``file:NAME@/path/file``   a network that is stored with its architecture (see ``stored``); also the path alone
``run:ID``                 a finished run's student (see ``stored``), in the folder of runs; also the run's folder
=========================  ============================================================================================

Users add their own by :func:`register_teacher` or an entry point. Imports nothing heavy; timm only for a look-up.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any

from atdiag.core.errors import UserError, suggest
from atdiag.core.spec import OWN, Network, Teacher
from atdiag.networks.registry import miniature, reading, recognition, specimens, stored
from atdiag.networks.registry.published import TIMM, TeacherEntry, published, table
from atdiag.networks.weights import adaptation, files, sources
from atdiag.networks.weights.sources import Source

HUB = "hf-hub:"

ENTRY_POINTS = "atdiag.teachers"


_OWN: dict[str, TeacherEntry] = {}


def register_teacher(
    name: str,
    model: str,
    *,
    file: str | Path | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    title: str | None = None,
    licence: str = "unknown",
    objective: str = "",
    data: str = "",
) -> None:
    """Add a user's teacher to the registry, for this process::

        register_teacher("pathology_s", "vit_small_patch16_224", file="/data/pathology.safetensors", title="Pathology")

    model: timm's name of its architecture, including any that you registered with timm. file: its weights (safetensors
    or a torch checkpoint, timm's names or an authors' layout); default: those on timm's hub. classes: rows of its head,
    0 without one; default: timm's for the model. arguments: constructor arguments beside timm's defaults, such as
    ``{"init_values": 1e-5}``. mean, std: of pixels in [0, 1]; default: timm's for the model.

    An entry point does the same for every process, including an experiment's workers. It names a dictionary of
    these arguments, or a function that returns one::

        # my_package/teachers.py
        pathology_s = {"model": "vit_small_patch16_224", "file": "/data/pathology.safetensors"}

        # pyproject.toml
        [project.entry-points."atdiag.teachers"]
        pathology_s = "my_package.teachers:pathology_s"

    Raises ValueError for a name that is taken or is not a valid reference, and for classes that are not a number or
    contradict the arguments.
    """
    if name in registry() or name in specimens.specimens():
        raise ValueError(f"there is already a teacher {name!r}")
    _OWN[name] = _own_row(
        name,
        model=model,
        file=file,
        classes=classes,
        arguments=arguments,
        mean=mean,
        std=std,
        title=title,
        licence=licence,
        objective=objective,
        data=data,
    )


def _own_row(
    name: str,
    model: str,
    file: str | Path | None = None,
    classes: int | None = None,
    title: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **facts: Any,
) -> TeacherEntry:
    if unknown := sorted({*facts} - {*signature(register_teacher).parameters}):
        raise ValueError(f"{', '.join(unknown)}: not an argument of register_teacher")
    if not name or any(character in name for character in ":@/ "):
        raise ValueError(f"{name!r} can't be a teacher's name: no ':', '@', '/' or space")
    known = {"licence": "unknown", "objective": "", "data": "", **{k: v for k, v in facts.items() if v is not None}}
    path = None if file is None else Path(file).expanduser()
    given = dict(arguments or {})
    if classes is not None:
        if type(classes) is not int or classes < 0:
            raise ValueError(f"`classes` {classes!r} is not a number of classes")
        if given.setdefault("num_classes", classes) != classes:
            raise ValueError(f"`classes` {classes} is not the num_classes of its arguments ({given['num_classes']})")
    return TeacherEntry(
        name=name,
        family=name,
        size="",
        title=title or name,
        model=model,
        file=path,
        classes=given.get("num_classes"),
        arguments=given,
        **known,
    )


@cache
def _installed() -> dict[str, TeacherEntry]:
    """Return the teachers that other packages provide by entry points."""
    rows = {}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            if entry.name in published() or entry.name in specimens.specimens():
                raise ValueError("that name is taken")
            given: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = entry.load()
            rows[entry.name] = _own_row(entry.name, **(given() if callable(given) else given))
        except Exception as fault:  # an error in another package must not hide the other teachers
            warnings.warn(f"the teacher {entry.name!r} of {entry.value} is left out ({fault})", stacklevel=2)
    return rows


def registry() -> dict[str, TeacherEntry]:
    """Return all teachers by name: published, from other packages, and registered in this process."""
    return {**published(), **_installed(), **_OWN}


def is_published(name: str) -> bool:
    """Return whether a name is in the registry's own table, rather than timm's or a user's."""
    return name in published()


def miniatures() -> tuple[str, ...]:
    """Return the names of the teachers that have a miniature."""
    return tuple(table()["miniature"])


def row(name: str) -> TeacherEntry:
    """Return the registry entry of a name. Raises UserError for an unknown one."""
    if name in specimens.specimens():
        raise UserError(f"{name} is a specimen, a miniature with a planted fault: it takes no file", f"type {name}")
    if name not in registry():
        word, colon, rest = name.partition(":")
        if colon:
            near = suggest(f"{word.lower()}:", (TIMM, stored.RUN)).replace(":'", f":{rest}'")
            raise UserError(f"unknown teacher {name!r}{near}", f"a prefix is {TIMM} or {stored.RUN}")
        if re.fullmatch("[0-9a-f]{4,16}", name):
            raise UserError(f"unknown teacher {name!r}", f"a run's student is named {stored.RUN}{name}")
        near = suggest(name, (*miniatures(), *specimens.specimens())) or suggest(name, registry())
        raise UserError(f"unknown teacher {name!r}{near}", "'atdiag teachers' lists them")
    return registry()[name]


def family(reference: str) -> str | None:
    """Return the family of a reference; None if it is not in the registry (``timm:MODEL``)."""
    found = registry().get(reference.partition("@")[0])
    return None if found is None else found.family


# --- miniatures ----------------------------------------------------------------------------------------------------


def stand_in(name: str) -> str:
    """Return the miniature with a teacher's architecture: its own, or the nearest in another family or size."""
    if name in miniatures():
        return name
    found = row(name)
    parts = set(found.components or ())

    def distance(other: str) -> tuple[int, bool]:
        return len(parts ^ set(table()["miniature"][other]["components"])), registry()[other].size != found.size

    return min(reversed(miniatures()), key=distance)


def miniature_network(name: str) -> Network:
    """Return the architecture of a teacher's miniature: the family's native components at small size.

    Raises UserError, naming a substitute, if the teacher has no miniature of its own.
    """
    found = row(name)
    own = table()["miniature"].get(name)
    if own is None:
        use = stand_in(name)
        kind = "the plain architecture" if not found.components else "the architecture"
        raise UserError(f"{name} has no miniature of its own: at this size it would be {kind} of {use}", f"use {use!r}")
    return miniature.network(found.size, **own)


# --- references ----------------------------------------------------------------------------------------------------


def source(reference: str) -> Source:
    """Return what a reference's published network is built from. Raises UserError if it names nothing."""
    name, at, typed = reference.partition("@")
    if name.startswith(stored.OURS):
        _, file, _ = sources.split_reference(stored.of_id(reference) if name.startswith(stored.RUN) else reference)
        return Source(name=name.removeprefix(stored.FILE), model="", file=file)
    if at and not typed:
        raise UserError(f"{reference!r} names no file", f"type {name}@/path/to/file")
    file, branch, facts = sources.split_marks(typed) if at else (None, "weights", {})
    if name.startswith(reading.VIT) and file is not None:
        return reading.source(sources.in_folder(file) if file.is_dir() else file, branch, facts)
    if facts:
        told = "".join(f"#{key}={value}" for key, value in facts.items())
        raise UserError(f"{name} says what {told} would", f"leave {told} out, or type {file}{told}")
    if name.startswith(TIMM):
        from atdiag.networks.timm import architectures

        return architectures.timm_source(name.removeprefix(TIMM), file=file, branch=branch)
    found = row(name)
    if not is_published(name):
        from atdiag.networks.timm import architectures

        return architectures.timm_source(
            found.model,
            name=name,
            file=file or found.file,
            branch=branch,
            arguments=found.arguments,
            mean=found.mean,
            std=found.std,
        )
    return Source(
        name=name,
        model=found.model,
        arguments=found.arguments,
        mean=found.mean,
        std=found.std,
        formats=found.formats,
        file=file,
        branch=branch,
        hub=found.hub,
        url=found.url,
    )


def canonical(reference: str) -> str:
    """Return the reference by name that a path stands for; any other is returned unchanged.

    Raises UserError for a path that does not exist, or whose architecture can't be told.
    """
    name = reference.partition("@")[0]
    if name.startswith(stored.RUN):
        return stored.of_id(reference)
    if name.startswith((TIMM, reading.VIT, stored.FILE)) or name in registry():
        return reference
    typed = next((reference.removeprefix(p) for p in (HUB, "local-dir:") if reference.startswith(p)), reference)
    path, branch, facts = sources.split_marks(typed)
    if path.exists():
        return stored.reference(path) or recognition.reference(path, branch, facts)
    if reference.startswith(HUB):
        return recognition.reference(sources.hub_folder(typed))
    marked = "#" in typed and Path(typed.partition("#")[0]).expanduser().exists()  # a mark that there is not
    if "@" not in typed and (marked or "/" in typed or typed.endswith(sources.SUFFIXES) or typed != reference):
        raise UserError(
            f"{path}: there is no such file{sources.near(path)}", "a teacher is a name, or an existing file"
        )
    return reference


def glance(reference: str, profile: str, image_size: int | None) -> None:
    """Raise UserError for a reference that can't be meant: :func:`teacher`'s first checks, without reading a file."""
    name, at, _ = reference.partition("@")
    if name.startswith(stored.RUN):
        stored.of_id(reference)
        return
    known = name in registry() or reference in specimens.specimens()
    if name.startswith((TIMM, reading.VIT, stored.FILE)) or known:
        _, file, _ = sources.split_reference(reference)
        if file is not None and not file.exists():
            raise UserError(f"{file}: there is no such file (weights of {name}){sources.near(file)}")
    elif not _existing(reference):
        canonical(reference)
        row(name)
    path = Path(reference).expanduser()
    if name.startswith(stored.FILE) or (not at and (stored.run_of(path) or stored.network(path))):
        return  # a network of any size is right, scenes' included
    if image_size is None and (at or not known or not (is_published(name) or reference in specimens.specimens())):
        raise _needs_images(reference)


def _existing(reference: str) -> bool:
    """Return whether a reference is an existing path, or one of the hub's."""
    typed = next((reference.removeprefix(p) for p in (HUB, "local-dir:") if reference.startswith(p)), reference)
    return reference.startswith(HUB) or sources.split_branch(typed)[0].exists()


def _needs_images(reference: str) -> UserError:
    return UserError(
        f"{reference} needs real images, and the data set has none",
        "add `data` FOLDER with images of yours, or `profile` small for Imagenette",
    )


def teacher(reference: str, profile: str, image_size: int | None = None) -> Teacher:
    """Return the spec of a teacher at a profile: its network and its weights' hash.

    image_size: of the images that it will see; default: its native resolution, or its miniature's at mini. If its
    weights are not on this machine, ``sha256`` is None and the spec is only a plan (:func:`how_to_get` tells how to get
    them).

    Raises UserError for an unknown name, for one that needs real images where there are none, and for a damaged file.
    """
    if reference in specimens.specimens():
        return specimens.teacher(reference, profile, image_size)
    reference = canonical(reference)
    name = reference.partition("@")[0]
    if name.startswith(stored.OURS):
        return stored.teacher(reference, image_size, real=profile != "mini")
    unlisted = name.startswith((TIMM, reading.VIT))
    published = not unlisted and is_published(row(name).name)
    if profile == "mini" and published and name == reference:
        return _miniature(name, image_size)
    if image_size is None and published and profile != "mini":
        image_size = row(name).image_size
    try:  # first, so that a mistyped name is reported before anything the network would need
        origin = source(reference)
        path = sources.find(origin)
    except sources.WeightsMissingError as fault:
        raise UserError(str(fault)) from None
    if image_size is None:
        raise _needs_images(reference)
    from atdiag.networks.timm import architectures

    if path is not None:
        files.check(path)
    origin = adaptation.planned(origin, path)
    return Teacher(
        name=_absolute(reference),
        profile=profile if published or unlisted else OWN,
        network=architectures.network(origin, image_size),
        sha256=None if path is None else sources.sha256(path),
        branch="weights" if origin.branch == "teacher" else origin.branch,
    )


def _absolute(reference: str) -> str:
    """Make a reference's path absolute, so that another process finds the file."""
    name, at, typed = reference.partition("@")
    return f"{name}@{Path(typed).expanduser().absolute()}" if at else name


def _miniature(name: str, image_size: int | None) -> Teacher:
    own = miniature_network(name)
    if image_size not in (None, own.image_size):
        raise UserError(
            f"{name} (mini) is a miniature for scenes of {own.image_size} px, not for images of {image_size} px",
            "use `profile` small for the published network",
        )
    try:
        return sources.shipped(name)
    except sources.WeightsMissingError as fault:
        raise UserError(str(fault)) from None


def how_to_get(found: Teacher) -> str:
    """Return a one-line instruction for getting a teacher's weights onto this machine."""
    if is_shipped(found):
        return f"'atdiag pretrain {specimens.shipped_file(found).stem} --install' makes them"
    return sources.how_to_get(source(found.name))


def is_miniature(found: Teacher) -> bool:
    """Return whether a teacher is a miniature that stands for a published one (profile mini, name without a file)."""
    return found.profile == "mini" and found.name in miniatures()


def is_shipped(found: Teacher) -> bool:
    """Return whether a teacher's weights ship with the package: a miniature's, or a specimen's."""
    return is_miniature(found) or specimens.is_specimen(found)
